"""What the edit costs in a model: python -m bench.model [--case layer|stack|polyglot|qwen] [--out FILE]

Prefill (one forward pass over whole prompts) and decode (one token into a static cache, the same work at every step)
of the original and of every way of editing it (`bench.methods`), in one run, interleaved.

    layer      one decoder layer of Qwen2.5-3B's shapes, edited
    stack      four decoder layers of Qwen2.5-3B's shapes, two of them edited, a small vocabulary (default on a CPU)
    polyglot   the embedded model with its own subspace's layers
    qwen       Qwen2.5-3B's shapes whole, 36 layers, 18 edited, random weights (default on CUDA)

Correctness first: each provider's logits of the timed inputs are compared with those of the exactly edited model in
the next wider dtype. error/bound is their largest error in a row over the certificate's gate, twice the original's own
(`Oracle`); a provider beyond 1 is not timed. A ratio is called slower or faster only beyond the noise, which is what
the original shows against itself, and every table says what overhead it could have shown. Launches are counted when all
times are taken, in the last case alone: a profiler may slow what follows it.

Every way runs the same attention: transformers builds another mask, and takes a slower kernel, where it sees a graph
being captured or traced. Prefill is given no mask (causal), a decoding step the mask of what its cache holds.
"""

import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import NOISE, Timer, against, ends, graphed, interleaved, launches, percentiles, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.load import POLYGLOT, load_model, parse_device, parse_dtype

OURS = ("hook", "fused", "fused output", "lora", "baked")
# As it is, by torch.compile, as a replayed CUDA graph, and both.
HOWS = ("eager", "compile", "graph", "compile+graph")
# The promise: so much of the original's speed where it is compiled or captured on a GPU.
GOAL = 0.99
# Sequences whose logits are checked; all of them are timed.
CHECKED = 8
# (phase, sequences, tokens): prefill of so many tokens, or a decoding step after so many.
CASES = {
    "layer": [("prefill", 1, 128), ("decode", 1, 128)],
    "stack": [("prefill", 1, 128), ("decode", 1, 128), ("decode", 8, 128), ("decode", 64, 128)],
    "polyglot": [("prefill", 1, 64), ("prefill", 64, 64), ("decode", 1, 64), ("decode", 64, 64)],
    # What matters most comes first: the rows of a run that is stopped are kept.
    "qwen": [
        ("decode", 1, 1024),
        ("prefill", 1, 2048),
        ("decode", 8, 1024),
        ("prefill", 8, 2048),
        ("decode", 64, 1024),
    ],
}
SHAPES = {
    "layer": {"num_hidden_layers": 1, "vocab_size": 64},
    "stack": {"num_hidden_layers": 4, "vocab_size": 2048},
    "qwen": {},
}


def load(case: str, dtype, device, layers: int | None = None):
    """(model, bases) of a case."""
    from bench.shapes import random_bases, random_model

    if case == "polyglot":
        from kernel_surgery.subspace.artifact import Subspace

        model = load_model("polyglot", dtype, device).requires_grad_(False)
        bases = Subspace.load(POLYGLOT / "subspace.safetensors").bases
        return model, {layer: basis.to(device) for layer, basis in bases.items()}
    model = random_model(dtype, device, **SHAPES[case] | ({"num_hidden_layers": layers} if layers else {}))
    return model, random_bases(model, layers=[0] if case == "layer" else None)


def prompts(model, sequences: int, tokens: int):
    """Random ids [sequences, tokens + 1]; the last is the one that a decoding step reads."""
    import torch

    generator = torch.Generator().manual_seed(sequences + tokens)
    return torch.randint(1, model.config.vocab_size, (sequences, tokens + 1), generator=generator).to(model.device)


class Step:
    """One timed call of one provider: a prefill, or a decoding step into a static cache of its own."""

    def __init__(self, call: Callable, phase: str, ids, room: int):
        import torch
        from transformers import StaticCache

        self.call, self.cache = call, None
        tokens = ids.shape[1] - 1
        if phase == "prefill":
            self.inputs = {"input_ids": ids[:, :tokens], "use_cache": False, "logits_to_keep": 1}
            self.inputs["attention_mask"] = {"full_attention": None}
            return
        self.cache = StaticCache(config=call.model.config, max_cache_len=tokens + room)
        with torch.no_grad():
            call(input_ids=ids[:, :tokens], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        held = torch.arange(tokens + room, device=ids.device) <= tokens
        self.inputs = {"input_ids": ids[:, tokens:], "past_key_values": self.cache, "use_cache": True}
        self.inputs["attention_mask"] = {"full_attention": held.expand(len(ids), 1, 1, -1)}
        self.inputs["position_ids"] = torch.full((1, 1), tokens, device=ids.device)
        # Where the cache stands. Rewound between the rounds, outside what is timed.
        self.marks = [(layer.cumulative_length, layer.cumulative_length.clone()) for layer in self.cache.layers]

    def rewind(self) -> None:
        for place, value in self.marks if self.cache is not None else ():
            place.copy_(value)

    def __call__(self):
        import torch

        with torch.no_grad():
            return self.call(**self.inputs)[:, -1]


def wider(dtype):
    """The dtype that an oracle computes in."""
    import torch

    return torch.float64 if dtype == torch.float32 else torch.float32


def last_logits(model, ids, keep: int = 1):
    """The last `keep` logits of every sequence, [sequences, keep, words], in memory of their own."""
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.clone()


def row_errors(logits, exact):
    """Root-mean-square error over the vocabulary, one a row."""
    return (logits.double() - exact.double()).square().mean(-1).sqrt()


class Oracle:
    """The model in the next wider dtype, edited and not: what the timed logits are held against.

    `own` is the yardstick: the largest error of the original model's logits among so many rows of other prompts. The
    error of one row alone may be small by luck.
    """

    def __init__(self, model, bases: dict, sequences: int = 8, tokens: int = 64, keep: int = 16):
        import copy

        # Widened tensor by tensor: every value stays what it is.
        self.exact, self.bases = copy.deepcopy(model).to(wider(model.dtype)), bases
        ids = prompts(model, sequences, tokens)
        self.own = float(row_errors(last_logits(model, ids, keep), last_logits(self.exact, ids, keep)).max())

    def logits(self, ids) -> dict:
        """{"original", "edited"}: last logits of the whole sequences, [sequences, words]."""
        from kernel_surgery import hooked

        found = {"original": last_logits(self.exact, ids)[:, -1]}
        with hooked(self.exact, self.bases):
            return found | {"edited": last_logits(self.exact, ids)[:, -1]}

    def error_over_bound(self, name: str, logits, exact: dict) -> float:
        """A provider's largest error among its rows, over the certificate's gate times the yardstick."""
        from kernel_surgery.certify.model import BESIDE_ORIGINAL

        which = "original" if name in ("original", NOISE) else "edited"
        return float(row_errors(logits, exact[which]).max()) / (BESIDE_ORIGINAL * self.own)


def prepared(name: str, step: Step, how: str) -> Callable:
    """The step as it will be timed: as it is, compiled, or captured. What it gives is in memory of its own."""
    import torch

    if how == "compile+graph":
        run = prepared(name, step, "compile")
        run()
        return graphed(run, before=step.rewind)
    if how == "compile":
        # A function of its own: dynamo keeps its graphs by code object and does not look at hooks, so that steps that
        # share one would all run the graph of whichever was compiled last.
        names: dict = {"step": step}
        exec(compile("def call():\n    return step()", f"<{name}>", "exec"), names)
        return torch.compile(names["call"], dynamic=False)
    if how == "graph":
        return graphed(step, before=step.rewind)
    return step


class Prepared:
    """Every provider's step of one phase and size, checked and ready to be timed.

    runs: those that met their bound. ratios, breaks: error/bound and graph breaks of all. left_out: why the others are
    not in `runs`. What is checked is what is timed: the logits that the compiled function or the replayed graph gives.
    """

    def __init__(self, calls: dict[str, Callable], oracle: "Oracle", phase: str, ids, how: str):
        import torch

        exact = oracle.logits((ids if phase == "decode" else ids[:, :-1])[:CHECKED])
        self.steps, self.runs, self.ratios, self.breaks, self.left_out = {}, {}, {}, {}, {}
        if how.startswith("compile"):
            torch._dynamo.reset()
        for name, call in calls.items():
            torch._dynamo.utils.counters.clear()
            try:
                step = Step(call, phase, ids, room=64)
                run = prepared(name, step, how)
                step.rewind()
                logits = run()[:CHECKED]
            except Exception as error:  # what cannot be run, captured or compiled says so, and leaves the others alone
                first = (str(error).splitlines() or [""])[0]
                self.left_out[name] = f"{how}: {type(error).__name__}: {first[:120]}"
                continue
            step.rewind()
            self.ratios[name] = oracle.error_over_bound(name, logits, exact)
            if how.startswith("compile"):
                self.breaks[name] = sum(torch._dynamo.utils.counters["graph_break"].values())
            if self.ratios[name] <= 1:  # NaN is not
                self.steps[name], self.runs[name] = step, run
            else:
                self.left_out[name] = "its logits break their bound"
        if not {"original", NOISE} <= self.runs.keys():
            self.left_out |= {name: "the original itself could not be timed" for name in self.runs}
            self.steps, self.runs = {}, {}

    def times(self, timer: Timer, rounds: int, advance: Callable) -> dict[str, list[float]]:
        """{name: microseconds a round} of those that are timed; caches are rewound outside of what is timed."""

        def one(name: str) -> float:
            try:
                return timer.once(self.runs[name], "launched", name)
            finally:
                self.steps[name].rewind()

        return interleaved({name: lambda name=name: one(name) for name in self.runs}, rounds, advance)

    def launches(self, name: str) -> int | None:
        """How many kernels a call starts."""
        found = launches(self.runs[name])
        self.steps[name].rewind()
        return found


def measure(
    calls: dict[str, Callable],
    oracle: "Oracle",
    case: tuple[str, int, int],
    how: str,
    rounds: int,
    bandwidth: float,
    advance: Callable = lambda done: None,
    count: bool = False,
) -> list[dict]:
    """Rows of one case (phase, sequences, tokens). how: a value of HOWS. count: launches too, when times are taken."""
    model, bases, (phase, sequences, tokens) = calls["original"].model, oracle.bases, case
    cuda = model.device.type == "cuda"
    ready = Prepared(calls, oracle, phase, prompts(model, sequences, tokens), how)
    times = ready.times(Timer(model.device, 4 if phase == "decode" else 1), rounds, advance) if ready.runs else {}
    compared, rows = against(times) if times else {}, []
    m, read = rows_of(phase, sequences, tokens), weight_bytes(model)
    about = {"sequences": sequences, "tokens": tokens, "how": how, "layers": len(model.model.layers)}
    about |= {"edited": len(bases), "M": m, "d": model.config.hidden_size, "k": next(iter(bases.values())).shape[1]}
    about |= {"dtype": str(model.dtype).removeprefix("torch."), "cache": "warm", "graph": how.endswith("graph")}
    about |= dict.fromkeys(("us_added", "tokens_per_s", "goal_met"))
    for name in calls:
        row = record("model", phase, name, **about, error_over_bound=ready.ratios.get(name))
        row |= {"graph_breaks": ready.breaks.get(name), "left_out": ready.left_out.get(name)}
        if name in times:
            row |= percentiles(times[name]) | compared[name]
            row["us_added"] = statistics.median(t - b for t, b in zip(times[name], times["original"], strict=True))
            row |= {"tokens_per_s": m / row["us_p50"] * 1e6, "gbps": read / row["us_p50"] / 1e3}
            row["fraction_of_copy"] = row["gbps"] / bandwidth
            if name == "fused" and cuda and how != "eager":
                row["goal_met"] = goal_met(row)
            if cuda and count:
                row["launches"] = ready.launches(name)
        rows.append(row)
    return rows


def goal_met(row: dict) -> bool:
    """Whether a provider keeps GOAL of the original's speed, whatever is still uncertain about its ratio of times."""
    return ends(row)[1] <= 1 / GOAL


def shown(row: dict) -> str:
    """One line of the table."""
    if row["left_out"]:
        ratio = row["error_over_bound"]
        return f"  {row['provider']:<16} {row['left_out']} (error/bound {'-' if ratio is None else f'{ratio:.2f}'})"
    low, high = ends(row)
    count = "" if row["launches"] is None else f"  launches {row['launches']}"
    count += "" if row["graph_breaks"] is None else f"  graph breaks {row['graph_breaks']}"
    goal = "" if row["goal_met"] is None else f"  {GOAL} of its speed: {'met' if row['goal_met'] else 'not met'}"
    return (
        f"  {row['provider']:<16} {row['us_p50'] / 1e3:>9.3f} ms  {row['ratio']:.3f} of original ({low:.3f} to "
        f"{high:.3f})  {row['us_added']:>+8.1f} us  {row['verdict']:<16}  error/bound {row['error_over_bound']:.2f}"
        f"{count}{goal}"
    )


def rows_of(phase: str, sequences: int, tokens: int) -> int:
    """Rows of activations that one call of a phase computes."""
    return sequences * (tokens if phase == "prefill" else 1)


def weight_bytes(model) -> int:
    """Bytes of a model's parameters, each counted once: what a forward pass has to read at least."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def ceiling(model, bases, phase: str, sequences: int, tokens: int, bandwidth: float) -> str:
    """What the memory allows at best: every weight read once; and what the edit adds to it."""
    size, weights = model.dtype.itemsize, weight_bytes(model)
    rows = rows_of(phase, sequences, tokens)
    edit = sum((2 * rows + 2 * b.shape[1]) * b.shape[0] * size for b in bases.values())
    return (
        f"{phase} {sequences} x {tokens}: reading the weights takes {weights / bandwidth / 1e6:.2f} ms at the copy's "
        f"{bandwidth:.0f} GB/s; an edit that reads and writes its rows once adds {edit / bandwidth / 1e6:.3f} ms"
    )


def parser() -> Parser:
    """The command line."""
    p = bench_parser("model", "Time a model with and without the edit, every way.")
    p.add_argument("--case", choices=tuple(CASES), help="default: qwen on CUDA, else stack")
    p.add_argument("--how", default="eager", help="comma-separated: eager, compile; on CUDA graph, compile+graph too")
    p.add_argument("--only", help="some of the case's sizes: comma-separated PHASE:SEQUENCES:TOKENS (decode:1:1024)")
    p.add_argument("--methods", help="comma-separated (default: all that are installed)")
    p.add_argument("--layers", type=int, help="fewer than the case has")
    p.add_argument("--dtype", default="auto", help=f"comma-separated: {', '.join(DTYPES)} (default: bfloat16 on CUDA)")
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling, then a table for each phase and size; 1 if one of our own modes could not be timed."""
    args = parser().parse_args(argv)
    device = parse_device(args.device)
    case = args.case or ("qwen" if device.type == "cuda" else "stack")
    hows = args.how.split(",")
    for how in hows:
        if how not in HOWS or (how.endswith("graph") and device.type != "cuda"):
            raise UserError(
                f"--how {how!r}: it takes eager, compile and, on CUDA, graph and compile+graph. Nothing was run."
            )
    sizes = CASES[case]
    if args.only:
        named = {f"{phase}:{sequences}:{tokens}": (phase, sequences, tokens) for phase, sequences, tokens in sizes}
        if unknown := [word for word in args.only.split(",") if word not in named]:
            raise UserError(f"--only {unknown[0]!r}: {case} has {', '.join(named)}. Nothing was run.")
        sizes = [named[word] for word in args.only.split(",")]
    from bench import methods
    from bench.timing import copy_bandwidth

    wanted = [n.strip() for n in args.methods.split(",")] if args.methods else list(methods.NAMES)
    if unknown := [n for n in wanted if n not in methods.NAMES]:
        raise UserError(f"unknown provider {unknown[0]!r}; known: {'; '.join(methods.NAMES)}.")
    dtypes = [parse_dtype(name, device) for name in args.dtype.split(",")]
    # What a peer's release says of itself in every call; graph breaks stand in the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="torch._dynamo")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    about = stamp(device, *dict.fromkeys(methods.PEERS.values()))
    bandwidth, rows = copy_bandwidth(device), []
    total = len(dtypes) * len(hows) * len(sizes) * (args.rounds + 1) * (len(wanted) + 2)
    with progress_bar(total, case, unit="call") as bar:
        for dtype in dtypes:
            absent = methods.missing(dtype)
            for name, why in absent.items():
                bar.write(f"{name}: {why}")
            names = list(dict.fromkeys(["original", NOISE, *(n for n in wanted if n not in absent)]))
            model, bases = load(case, dtype, device, args.layers)
            oracle = Oracle(model, bases)
            layers = len(model.model.layers)
            bar.write(f"{about['device']}: {case}, {layers} layers, {len(bases)} edited, {str(dtype)[6:]}")
            for how in hows:
                for one in sizes:
                    last = (dtype, how, one) == (dtypes[-1], hows[-1], sizes[-1])
                    bar.write(f"{how}, {ceiling(model, bases, *one, bandwidth)}")
                    with methods.opened(model, bases, names) as calls:
                        found = measure(calls, oracle, one, how, args.rounds, bandwidth, bar.update, last)
                    for row in found:
                        rows.append(row | {"model": case} | about)
                        bar.write(shown(row))
                    if detectable := next((row["detectable"] for row in found if not row["left_out"]), None):
                        bar.write(f"  an overhead of {detectable:.1%} or more would have been called slower")
                    keep(args.out, rows)
            del model, oracle
    print(json.dumps({"case": f"model {case}", "rows": len(rows), **about}))
    return 1 if any(row["left_out"] for row in rows if row["provider"] in OURS) else 0


if __name__ == "__main__":
    main(run)
