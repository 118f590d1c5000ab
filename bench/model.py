"""Time a whole model with the edit: python -m bench.model [--case layer|stack|polyglot|qwen] [--out FILE]

It times the original model and every method (`bench.methods`), interleaved in one run, in two phases. Prefill is one
forward pass over whole prompts. Decode adds one token to a static cache, so every step does the same work.

    layer      one decoder layer of Qwen2.5-3B's shapes, edited
    stack      four decoder layers of these shapes, two of them edited, with a small vocabulary (default on a CPU)
    polyglot   the embedded model, edited in the layers of its own subspace
    qwen       the whole of Qwen2.5-3B's shapes: 36 layers, 18 edited, random weights (default on CUDA)

Correctness comes first. Each method's logits of the timed inputs are compared with the exactly edited model in the next
wider dtype. error/bound is the largest error of a row over twice the original's own error (`Oracle`). A method above 1
is not timed. A ratio is called slower or faster only beyond the noise, which is the original's ratio to itself. Under
every table is the smallest slowdown that it could detect. Launches are counted in the last case only, after all
timing, because a profiler may slow what follows it.

All methods run the same attention. Left to itself, transformers builds another mask and takes a slower kernel while a
graph is captured or traced. So prefill gets no mask (causal), and a decoding step gets the mask of its cache.
"""

import json
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

from bench.logits import Oracle, prompts
from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import NOISE, Timer, against, ends, graphed, interleaved, launches, percentiles, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.load import POLYGLOT, load_model, parse_device, parse_dtype

OURS = ("hook", "fused", "fused output", "lora", "baked")
# Uncompiled, by torch.compile, as a replayed CUDA graph, and compiled and captured.
HOWS = ("eager", "compile", "graph", "compile+graph")
# The goal for `fused`: this share of the original's speed, compiled or captured on a GPU.
GOAL = 0.99
# The number of sequences whose logits are checked. All sequences are timed.
CHECKED = 8
# {case: [(phase, sequences, tokens)]}: prefill of that many tokens, or a decoding step after that many.
CASES = {
    "layer": [("prefill", 1, 128), ("decode", 1, 128)],
    "stack": [("prefill", 1, 128), ("decode", 1, 128), ("decode", 8, 128), ("decode", 64, 128)],
    "polyglot": [("prefill", 1, 64), ("prefill", 64, 64), ("decode", 1, 64), ("decode", 64, 64)],
    # The most important come first, since a run that is stopped keeps its rows.
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
        bases = Subspace.load(POLYGLOT.parent / "subspace.safetensors").bases
        return model, {layer: basis.to(device) for layer, basis in bases.items()}
    model = random_model(dtype, device, **SHAPES[case] | ({"num_hidden_layers": layers} if layers else {}))
    return model, random_bases(model, layers=[0] if case == "layer" else None)


class Step:
    """One timed call of one method: a prefill, or a decoding step with a static cache of its own."""

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
        # The positions of the cache, rewound between rounds and outside the timing.
        self.marks = [(layer.cumulative_length, layer.cumulative_length.clone()) for layer in self.cache.layers]

    def rewind(self) -> None:
        for place, value in self.marks if self.cache is not None else ():
            place.copy_(value)

    def __call__(self):
        import torch

        with torch.no_grad():
            return self.call(**self.inputs)[:, -1]


def own_code(name: str, step: Callable) -> Callable:
    """A function that calls `step` and whose code object no other function has.

    Dynamo keeps its graphs by code object and does not look at hooks. Steps that shared a code object would all run the
    graph that was compiled last.
    """

    def call():
        return step()

    call.__code__ = call.__code__.replace(co_name=name)  # all closures of one `def` share one code object
    return call


def prepared(name: str, step: Step, how: str) -> Callable:
    """The step in the form that is timed: uncompiled, compiled, or captured. Steps share no result."""
    import torch

    if how == "compile+graph":
        run = prepared(name, step, "compile")
        run()
        return graphed(run, before=step.rewind)
    if how == "compile":
        return torch.compile(own_code(name, step), dynamic=False)
    if how == "graph":
        return graphed(step, before=step.rewind)
    return step


class Prepared:
    """Every method's step of one phase and size, checked and ready for timing.

    runs: the steps that meet their bound. left_out: why each of the others is not in `runs`. ratios, breaks:
    error/bound and graph breaks of all. The check is of the timed function: the compiled one, or the replayed graph.
    """

    def __init__(self, calls: dict[str, Callable], oracle: Oracle, phase: str, ids, how: str):
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
            except Exception as error:  # a method that cannot be run, captured or compiled does not stop the others
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
                self.left_out[name] = "its logits exceed their bound"
        if not {"original", NOISE} <= self.runs.keys():
            self.left_out |= {name: "the original itself could not be timed" for name in self.runs}
            self.steps, self.runs = {}, {}

    def times(self, timer: Timer, rounds: int, advance: Callable) -> dict[str, list[float]]:
        """{name: microseconds of each round} of the timed methods. Caches are rewound outside the timing."""

        def one(name: str) -> float:
            try:
                return timer.once(self.runs[name], "launched", name)
            finally:
                self.steps[name].rewind()

        return interleaved({name: lambda name=name: one(name) for name in self.runs}, rounds, advance)

    def launches(self, name: str) -> int | None:
        """How many kernels a call starts. None if the profiler sees nothing."""
        count = launches(self.runs[name])
        self.steps[name].rewind()
        return count


def measure(
    calls: dict[str, Callable],
    oracle: Oracle,
    case: tuple[str, int, int],
    how: str,
    rounds: int,
    bandwidth: float,
    advance: Callable = lambda done: None,
    count: bool = False,
) -> list[dict]:
    """Rows of one case (phase, sequences, tokens). how: one of HOWS. count: count launches too, after the timing."""
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
    """Whether a method keeps GOAL of the original's speed over the whole interval of its ratio."""
    return ends(row)[1] <= 1 / GOAL


def row_text(row: dict) -> str:
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
    """The number of activation rows that one call of a phase computes."""
    return sequences * (tokens if phase == "prefill" else 1)


def weight_bytes(model) -> int:
    """Bytes of a model's parameters, each counted once: the least that a forward pass has to read."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def ceiling(model, bases, phase: str, sequences: int, tokens: int, bandwidth: float) -> str:
    """The best that memory bandwidth allows: the time to read every weight once, and what the edit adds."""
    size, weights = model.dtype.itemsize, weight_bytes(model)
    rows = rows_of(phase, sequences, tokens)
    edit = sum((2 * rows + 2 * b.shape[1]) * b.shape[0] * size for b in bases.values())
    return (
        f"{phase} {sequences} x {tokens}: reading the weights takes {weights / bandwidth / 1e6:.2f} ms at the copy's "
        f"{bandwidth:.0f} GB/s; an edit that reads and writes its rows once adds {edit / bandwidth / 1e6:.3f} ms"
    )


def parser() -> Parser:
    """The command line."""
    p = bench_parser("model", "Time a model without the edit and with it, by every method.")
    p.add_argument("--case", choices=tuple(CASES), help="default: qwen on CUDA, else stack")
    p.add_argument("--how", default="eager", help="comma-separated: eager, compile; on CUDA also graph, compile+graph")
    p.add_argument(
        "--only", help="run only these sizes of the case: comma-separated PHASE:SEQUENCES:TOKENS (decode:1:1024)"
    )
    p.add_argument("--methods", help="comma-separated names (default: all that are installed)")
    p.add_argument("--layers", type=int, help="use fewer layers than the case has")
    p.add_argument(
        "--dtype",
        default="auto",
        help=f"comma-separated: {', '.join(DTYPES)} (default: bfloat16 on CUDA, else float32)",
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling, then a table for each phase and size. Returns 1 if one of our own modes could not be timed."""
    args = parser().parse_args(argv)
    device = parse_device(args.device)
    case = args.case or ("qwen" if device.type == "cuda" else "stack")
    hows = args.how.split(",")
    for how in hows:
        if how not in HOWS or (how.endswith("graph") and device.type != "cuda"):
            raise UserError(
                f"--how {how!r}: choose eager or compile, or on CUDA also graph or compile+graph. Nothing was run."
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
        raise UserError(f"unknown method {unknown[0]!r}; known: {'; '.join(methods.NAMES)}. Nothing was run.")
    dtypes = [parse_dtype(name, device) for name in args.dtype.split(",")]
    # Warnings that a peer prints in every call. Graph breaks are in the table.
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
                        measured = measure(calls, oracle, one, how, args.rounds, bandwidth, bar.update, last)
                    for row in measured:
                        rows.append(row | {"model": case} | about)
                        bar.write(row_text(row))
                    if detectable := next((row["detectable"] for row in measured if not row["left_out"]), None):
                        bar.write(f"  smallest detectable slowdown: {detectable:.1%}")
                    keep(args.out, rows)
            del model, oracle
    print(json.dumps({"case": f"model {case}", "rows": len(rows), **about}))
    return 1 if any(row["left_out"] for row in rows if row["provider"] in OURS) else 0


if __name__ == "__main__":
    main(run)
