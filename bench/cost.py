"""What collect, fit and eval cost for a model of any size, from measured rates: python -m bench.cost

    --measure          first measure what the predictions are compared with: collect of the embedded model, and fits of
                       its and of SmolLM2's width
    --tflops, --decode-tflops, --gbps   rates of your own device in place of those measured on a GPU

A multiply and an add are two operations. With T prompt tokens, P parameters that a token passes through, and N of them
in the decoder layers:

    collect    2 N T operations. For moments also 2 T d^2 in float64 in each layer, and d^2 * 8 bytes in each layer
    fit        per layer, the measured seconds at the nearest width times (d / that width)^slope. It holds the moments
               of all layers, and c d^2 bytes in addition, with c measured
    eval       2 P operations for every new token. A step writes one token of each text in a batch. It takes no less
               than reading all weights once

Not counted: attention's own products, which are below 5% at 2048 tokens; reading and writing files; loading the model.
"""

import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import tables
from bench.growth import slope
from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import percentiles, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.names import MODES
from kernel_surgery.models.architectures import default_layers

GPU = "20261127-nvidia-h200"
GPU_BYTES = 141e9  # an H200's memory
BATCH, BUDGET, PROBLEMS, LANGUAGES = 64, 256, 200, 2  # the defaults of eval
ROUNDS = 5


@dataclass(frozen=True)
class Model:
    """The sizes of a model.

    total: all parameters. active: those that a token passes through when a text is written, the output embedding
    included. body: those of the decoder layers, which collect runs.
    """

    name: str
    layers: int
    d: int
    total: float
    active: float
    body: float

    @classmethod
    def dense(cls, name: str, layers: int, d: int, ff: int, kv: int, vocabulary: int, tied: bool) -> "Model":
        """A Llama-shaped model. kv: heads of keys times their width. The heads of queries are d wide together."""
        body = layers * (2 * d * d + 2 * d * kv + 3 * d * ff)
        embedding = vocabulary * d
        return cls(name, layers, d, body + embedding * (1 if tied else 2), body + embedding, body)

    @property
    def edited(self) -> int:
        """How many layers `fit` edits by default."""
        return len(default_layers(self.layers))


SMOLLM2 = Model.dense("SmolLM2-135M", 30, 576, 1536, 192, 49152, True)
POLYGLOT = Model.dense("polyglot", 8, 128, 384, 64, 1536, True)
QWEN_LAYER = Model.dense("a layer of Qwen2.5-3B", 1, 2048, 11008, 256, 0, True)
# Public sizes. A token of a mixture of experts passes through the embeddings too, so its body is a little smaller.
TARGETS = (
    Model.dense("Qwen2.5-3B", 36, 2048, 11008, 256, 151936, True),
    Model.dense("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256, False),
    Model("Llama-4-Maverick", 48, 5120, 400e9, 17e9, 17e9),
)


@dataclass(frozen=True)
class Law:
    """A quantity measured at several widths: value(d) = that at the nearest width times (d / width)^exponent."""

    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def exponent(self) -> tuple[float, float]:
        """(fitted exponent, half of its 95% interval)."""
        return slope(self.sizes, self.values)

    def at(self, d: float, exponent: float | None = None) -> float:
        """The value at width d, by the fitted exponent or by a given one."""
        width, value = min(zip(self.sizes, self.values, strict=True), key=lambda pair: abs(math.log(d / pair[0])))
        return value * (d / width) ** (self.exponent[0] if exponent is None else exponent)


@dataclass(frozen=True)
class Rates:
    """What was measured.

    cpu: float32 operations per second of processor time, in the layers. prefill, decode: bfloat16 operations per second
    on the GPU, in a prompt and in a step of BATCH texts. copy: bytes per second there. tokens: of the prompts that
    collect reads by default. moments: processor seconds for each token and layer. fit, peak: processor seconds and
    bytes of one layer's oblique fit.
    """

    cpu: float
    prefill: float
    decode: float
    copy: float
    tokens: int
    moments: Law
    fit: Law
    peak: Law


def original(name: str, case: str, **wanted) -> dict:
    """The row of the original model in a file of bench.model. Raises LookupError if there is none."""
    for row in tables.rows(name):
        if (row["provider"], row["case"]) == ("original", case) and all(row[k] == v for k, v in wanted.items()):
            return row
    raise LookupError(f"bench/results/{name} has no {case} of the original with {wanted}.")


def rates() -> Rates:
    """The rates, from the stored rows."""
    row = original("model-stack.json", "prefill", dtype="float32", how="eager")
    threads = int(row["machine"].split(" threads")[0].rpartition(" ")[2])
    cpu = 2 * row["layers"] * QWEN_LAYER.body * row["M"] / (row["us_p50"] / 1e6 * threads)
    qwen, on_gpu = TARGETS[0], f"{GPU}/model.json"
    prefill, step = original(on_gpu, "prefill", sequences=1), original(on_gpu, "decode", sequences=BATCH)
    laws = []
    for case, key in (("moments", "cpu_us_p50"), ("oblique", "cpu_us_p50"), ("oblique", "peak_bytes")):
        found = [r for r in tables.rows("growth-moments.json") if r["case"] == case]
        unit = (1e6 if key == "cpu_us_p50" else 1.0) * (found[0]["M"] if case == "moments" else 1)
        laws.append(Law(tuple(r["size"] for r in found), tuple(r[key] / unit for r in found)))
    return Rates(
        cpu=cpu,
        prefill=2 * qwen.body * prefill["M"] / (prefill["us_p50"] / 1e6),
        decode=2 * qwen.active * BATCH / (step["us_p50"] / 1e6),
        copy=tables.rows(f"{GPU}/op.json")[0]["copy_gbps"] * 1e9,
        tokens=collected("kernel_surgery.collect")["tokens"],
        moments=laws[0],
        fit=laws[1],
        peak=laws[2],
    )


def collected(provider: str) -> dict:
    """The row of a way to collect, of SmolLM2."""
    return next(r for r in tables.rows("collect.json") if (r["case"], r["provider"]) == ("vectors", provider))


def steps(problems: int = PROBLEMS, languages: int = LANGUAGES, modes: int = len(MODES), budget: int = BUDGET) -> int:
    """The decoding steps of an evaluation if every text is as long as the budget."""
    return math.ceil(problems / BATCH) * languages * modes * budget


def costs(model: Model, measured: Rates) -> dict[str, float]:
    """{quantity: what it costs for a model}, in operations, seconds and bytes."""
    tokens, d = measured.tokens, model.d
    operations, moments = 2 * model.body * tokens, 2 * tokens * d * d * model.layers
    exponent, half = measured.fit.exponent
    held = model.layers * d * d * 8
    count = steps()
    # Texts of one batch may all take the same experts, or all of them.
    least, every = model.active * 2 / measured.copy, model.total * 2 / measured.copy
    return {
        "weights": model.total * 2,
        "collect operations": operations,
        "collect on the GPU": operations / measured.prefill,
        "collect on a core": operations / measured.cpu,
        "moments operations": moments,
        "moments on a core": measured.moments.at(d) * tokens * model.layers,
        "moments bytes": held,
        "devices": math.ceil((model.total * 2 + held) / GPU_BYTES),
        "fit of a layer": measured.fit.at(d),
        "fit of a layer, least": measured.fit.at(d, exponent - half),
        "fit of a layer, most": measured.fit.at(d, exponent + half),
        "fit": measured.fit.at(d) * model.edited,
        "fit bytes": held + measured.peak.at(d),
        "new tokens": PROBLEMS * LANGUAGES * len(MODES) * BUDGET,
        "eval operations": 2 * model.active * PROBLEMS * LANGUAGES * len(MODES) * BUDGET,
        "eval least": count * least,
        "eval on the GPU": count * max(every, 2 * model.active * BATCH / measured.decode),
    }


def checks(measured: Rates) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of everything that was measured beside what the rates were taken from.

    In processor seconds, except for the evaluation, whose time is that which passes.
    """
    vectors, pooled = (collected(name)["cpu_us_p50"] / 1e6 for name in ("kernel_surgery.collect", "--pool tokens"))
    extra = measured.moments.at(SMOLLM2.d) * measured.tokens * SMOLLM2.layers
    found = [
        ("collect, SmolLM2", 2 * SMOLLM2.body * measured.tokens / measured.cpu, vectors),
        ("collect, SmolLM2, what moments add", extra, pooled - vectors),
    ]
    for row in tables.rows("cost.json"):
        model, seconds = (POLYGLOT if row["d"] == POLYGLOT.d else SMOLLM2), row["cpu_us_p50"] / 1e6
        if row["case"] == "collect":
            found.append((f"collect, {model.name}", 2 * model.body * row["tokens"] / measured.cpu, seconds))
        else:
            found.append((f"fit, {model.name}'s width", measured.fit.at(model.d) * row["layers"], seconds))
    asked = json.loads((tables.RESULTS / "eval-polyglot.json").read_text(encoding="utf-8"))
    config, step = asked["config"], original("model-polyglot.json", "decode", sequences=BATCH, how="eager")
    count = steps(config["problems"], len(config["languages"]), len(asked["modes"]), config["max_new_tokens"])
    passed = 2 * POLYGLOT.active * BATCH / (measured.cpu * 2)  # on the two cores that measured it
    found.append(("eval, polyglot, by operations", count * passed, asked["seconds"]))
    return [*found, ("eval, polyglot, by its measured step", count * step["us_p50"] / 1e6, asked["seconds"])]


def long(seconds: float) -> str:
    """Seconds as text, in the unit that suits them."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def table(measured: Rates) -> str:
    """The costs of every target."""
    found = [costs(model, measured) for model in TARGETS]
    exponent, _ = measured.fit.exponent

    def one_layer(model: Model, c: dict[str, float]) -> str:
        if model.d in measured.fit.sizes:
            return f"{long(c['fit of a layer'])}, measured"
        return f"{long(c['fit of a layer'])} ({long(c['fit of a layer, least'])} to {long(c['fit of a layer, most'])})"

    def gb(key: str) -> list[str]:
        return [f"{c[key] / 1e9:.3g} GB" for c in found]

    def time_of(key: str) -> list[str]:
        return [long(c[key]) for c in found]

    def operations(key: str) -> list[str]:
        return [f"{c[key]:.1e}" for c in found]

    body = [
        ["layers x d_model", "public", *(f"{m.layers} x {m.d}" for m in TARGETS)],
        ["parameters", "public", *(f"{m.total / 1e9:.3g}e9" for m in TARGETS)],
        ["P, that a token passes through", "public", *(f"{m.active / 1e9:.3g}e9" for m in TARGETS)],
        ["weights in bfloat16", "2 bytes each", *gb("weights")],
        ["collect: operations", "2 N T", *operations("collect operations")],
        ["collect: time of one H200", "its rate in a prompt", *time_of("collect on the GPU")],
        ["collect: time of one core", "its rate in float32", *time_of("collect on a core")],
        ["moments: operations, float64", "2 T d^2 a layer", *operations("moments operations")],
        ["moments: time of one core", "its time by width", *time_of("moments on a core")],
        ["moments: memory, and file", "8 d^2 bytes a layer", *gb("moments bytes")],
        ["H200s that hold weights and moments", "141 GB each", *(f"{c['devices']:.0f}" for c in found)],
        ["fit: one layer, one core", f"d^{exponent:.2f} (95%)", *map(one_layer, TARGETS, found)],
        ["fit: the middle half of the layers", "their number", *time_of("fit")],
        ["fit: memory", "all moments, and one fit", *gb("fit bytes")],
        ["eval: operations", "2 P a token", *operations("eval operations")],
        ["eval: time of one H200, at least", "P read once a step", *time_of("eval least")],
        ["eval: time of one H200, at most", "rate in a step, or all weights", *time_of("eval on the GPU")],
    ]
    return tables.table(["", "from", *(m.name for m in TARGETS)], body)


def compared(measured: Rates) -> str:
    """The predictions beside what was measured."""
    body = [[what, long(p), long(m), f"{p / m:.2f}"] for what, p, m in checks(measured)]
    return tables.table(["", "predicted", "measured", "ratio"], body)


def page() -> str:
    """docs/scale.md: the rates, the costs, and the predictions that could be compared."""
    measured, stack = rates(), original("model-stack.json", "prefill", dtype="float32", how="eager")
    qwen, grown = original(f"{GPU}/model.json", "prefill", sequences=1), tables.rows("growth-moments.json")[0]
    exponent, half = measured.fit.exponent
    fits = ", ".join(f"{d}: {long(s)}" for d, s in zip(measured.fit.sizes, measured.fit.values, strict=True))
    of_d2 = measured.peak.values[-1] / measured.peak.sizes[-1] ** 2
    texts = PROBLEMS * LANGUAGES * len(MODES)
    return (
        f"T = {measured.tokens} prompt tokens: {PROBLEMS} problems in 7 languages, by SmolLM2's tokenizer. eval: "
        f"{PROBLEMS} problems, {LANGUAGES} languages, {len(MODES)} modes and {BUDGET} new tokens each, so "
        f"{texts * BUDGET} tokens in {steps()} steps of up to {BATCH} texts.\n\n{table(measured)}\n"
        "Measured:\n\n"
        f"- A core: {measured.cpu / 1e9:.1f}e9 operations/s in float32, in four layers of Qwen2.5-3B at 128 tokens. "
        f"{tables.where(stack)}"
        f"- An H200, in Qwen2.5-3B: {measured.prefill / 1e12:.0f}e12 operations/s in a prompt of {qwen['M']} tokens, "
        f"{measured.decode / 1e12:.1f}e12 in a step of {BATCH} texts at 1024 tokens in transformers, and "
        f"{measured.copy / 1e9:.0f} GB/s in a copy. {tables.where(qwen)}"
        f"- The oblique fit of a layer, in seconds of one core at d_model {fits}. The slope is {exponent:.2f} "
        f"({exponent - half:.2f} to {exponent + half:.2f}, 95%). It adds {of_d2:.0f} d^2 bytes at the peak (slope "
        f"{measured.peak.exponent[0]:.2f}). Moments: slope {measured.moments.exponent[0]:.2f}. {tables.where(grown)}"
        f"\nEverything else in the table is extrapolated: every width above {measured.fit.sizes[-1]}, and every time "
        "of a model at a rate of Qwen2.5-3B.\n\nThe same formulas beside runs, in seconds of a core (eval: in time "
        f"that passes, with its damage):\n\n{compared(measured)}"
    )


def measure() -> list[dict]:
    """Rows of collect of the embedded model, and of fits of its and of SmolLM2's width and number of layers."""
    import torch

    from kernel_surgery.common.names import LANGUAGES as ALL
    from kernel_surgery.models.load import load_model, load_tokenizer
    from kernel_surgery.problems.generator import problems
    from kernel_surgery.subspace.collecting import collect_activations
    from kernel_surgery.subspace.fitting import fit_subspace
    from kernel_surgery.subspace.moments import LanguageMoments, Moments

    about, found = stamp(), []

    def timed(call) -> dict:
        wall, cpu = [], []
        for _ in range(ROUNDS + 1):
            began, busy = time.perf_counter(), time.process_time()
            call()
            cpu.append((time.process_time() - busy) * 1e6)
            wall.append((time.perf_counter() - began) * 1e6)
        return percentiles(wall[1:]) | {"cpu_us_p50": statistics.median(cpu[1:]), "rounds": ROUNDS} | about

    model, tokenizer, chosen = load_model("polyglot", device="cpu"), load_tokenizer("polyglot"), problems("fit", 40)
    prompts = [p.prompts[language] for language in ALL for p in chosen]
    row = record("cost", "collect", "kernel_surgery.collect", M=len(prompts), d=POLYGLOT.d, dtype="float32")
    row |= {"tokens": sum(len(tokenizer(prompt).input_ids) for prompt in prompts), "layers": POLYGLOT.layers}
    found.append(row | timed(lambda: collect_activations(model, tokenizer, chosen, ALL)))
    for shape in (POLYGLOT, SMOLLM2):
        generator, labels = torch.Generator().manual_seed(0), torch.arange(2048) % len(ALL)
        moments = Moments.empty(len(ALL), shape.d)
        apart = torch.randn(len(ALL), shape.d, generator=generator)[labels]
        moments.add(torch.randn(2048, shape.d, generator=generator) + apart, labels)
        layers = list(default_layers(shape.layers))
        held = LanguageMoments(dict.fromkeys(layers, moments), {"languages": list(ALL), "n_layers": shape.layers})
        row = record("cost", "fit", "kernel_surgery.fit", d=shape.d, dtype="float64") | {"layers": len(layers)}
        found.append(row | timed(lambda held=held: fit_subspace(held, method="oblique")))
    return found


def parser() -> Parser:
    """The command line."""
    p = bench_parser("cost", "What collect, fit and eval cost for a model of any size, from measured rates.")
    p.add_argument("--measure", action="store_true", help="first measure what the predictions are compared with")
    p.add_argument("--tflops", type=float, help="1e12 bfloat16 operations per second of your device, in a prompt")
    p.add_argument("--decode-tflops", type=float, help="the same in a decoding step of 64 texts")
    p.add_argument("--gbps", type=float, help="1e9 bytes per second that your device reads and writes")
    p.add_argument("--out", type=Path, help="JSON file for the rows of --measure")
    return p


def run(argv: Sequence[str] | None = None) -> int:
    """Print the costs, and the predictions beside what was measured."""
    args = parser().parse_args(argv)
    if args.measure:
        keep(args.out, rows := measure())
        for row in rows:
            print(f"{row['case']} at d_model {row['d']}: {row['cpu_us_p50'] / 1e6:.3g} s of processor time")
    given = {"prefill": (args.tflops, 1e12), "decode": (args.decode_tflops, 1e12), "copy": (args.gbps, 1e9)}
    own = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    if own:
        print(f"In place of an H200: {', '.join(f'{name} {value:.3g}/s' for name, value in own.items())}")
    print(table(replace(rates(), **own)))
    print(compared(rates()))
    return 0


if __name__ == "__main__":
    main(run)
