"""Time and weigh `collect` beside a forward pass of the whole model: python -m bench.collect [--model smollm2]

    before                   what `collect` did at first: `model(...)`, with the product with the vocabulary, 32 prompts
                             of one language at a time
    before, body alone       the same batches through the layers alone
    kernel_surgery.collect   the layers alone, with the prompts of all languages in batches of so many tokens
    --pool tokens            the same, and float64 moments over all tokens

All layers are read. Before anything is timed, `collect` must give the bits that the whole model gives in the same
batches. Other batches round otherwise; the largest difference is printed. To keep a round short, each method runs every
so many-th of its batches, and its time is scaled by the tokens in them, without padding, to all prompts. Processor time
is printed too: beside other processes it is steadier than the time that passes.

Memory: what a collection adds to a loaded model, as the peak of a process's anonymous memory. Two random models differ
in nothing but their vocabulary, and each one is measured in a process of its own, both ways: a fork of one process that
has imported everything and allocated nothing else.
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import ends, interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.names import BATCH_TOKENS, LANGUAGES
from kernel_surgery.common.progress import progress_bar

PROMPTS = 32  # in a batch before
BEFORE, BODY, OURS, MOMENTS = "before", "before, body alone", "kernel_surgery.collect", "--pool tokens"
VOCABULARIES = (49_152, 151_936)  # of SmolLM2 and Qwen2.5
SAME = 0.05  # the largest difference of two peaks that are called equal
_CHILD = "KERNEL_SURGERY_BENCH_MEMORY"


def batches_before(lengths: Sequence[int], languages: int) -> list[list[int]]:
    """Language by language, the longest first, `PROMPTS` at a time. The prompts stand language by language."""
    each, found = len(lengths) // languages, []
    for start in range(0, len(lengths), each):
        order = sorted(range(start, start + each), key=lambda i: -lengths[i])
        found += [order[i : i + PROMPTS] for i in range(0, each, PROMPTS)]
    return found


def read_whole(model, tokenizer, encoded, batches, whole: bool = True):
    """{layer: [prompts, d_model]} at every MLP's output and the last token. whole: also run the output embedding."""
    import torch

    from kernel_surgery.models.architectures import mlp_outputs
    from kernel_surgery.models.padding import padded, padding_id
    from kernel_surgery.subspace.collecting import pool_states

    sites, pad = mlp_outputs(model), padding_id(model, tokenizer)
    rows = {layer: torch.empty(len(encoded), model.config.hidden_size) for layer in sites}
    now = {}

    def catch(layer):
        def hook(module, inputs, output):
            rows[layer][now["batch"]] = pool_states(output, now["mask"], "last").cpu()

        return hook

    handles = [site.module.register_forward_hook(catch(layer)) for layer, site in sites.items()]
    for batch in batches:
        ids, mask = padded([encoded[i] for i in batch], pad, tokenizer.padding_side, model.device)
        now |= {"batch": batch, "mask": mask}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            (model if whole else model.model)(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            )
    for handle in handles:
        handle.remove()
    return rows


@dataclass(frozen=True)
class Slice:
    """Every so many-th batch of one way to batch, and how many tokens it has without padding."""

    batches: list[list[int]]
    tokens: int

    @classmethod
    def of(cls, batches: list[list[int]], lengths: Sequence[int], every: int) -> "Slice":
        chosen = batches[every // 2 :: every] or batches[:1]
        return cls(chosen, sum(lengths[i] for batch in chosen for i in batch))


def checked(model, tokenizer, prompts: Sequence[str]) -> float:
    """The largest difference to batches of `PROMPTS`, relative to the largest entry of a layer.

    Raises RuntimeError if `collect` has other bits than the whole model in the same batches.
    """
    import torch

    from kernel_surgery.subspace.collecting import encode, prompt_states

    encoded, batches = encode(tokenizer, prompts, BATCH_TOKENS)
    ours = prompt_states(model, tokenizer, prompts, range(model.config.num_hidden_layers))
    for layer, x in read_whole(model, tokenizer, encoded, batches).items():
        if not torch.equal(x, ours[layer]):
            raise RuntimeError(f"layer {layer} has other bits than in the whole model: nothing was timed")
    before = read_whole(model, tokenizer, encoded, batches_before([len(ids) for ids in encoded], 1))
    return max(float((x - ours[layer]).abs().max() / x.abs().max()) for layer, x in before.items())


def calls(model, tokenizer, prompts: Sequence[str], budgets: Sequence[int], every: int) -> dict[str, tuple]:
    """{method: (function that reads a slice of the prompts once, the slice's tokens)}.

    prompts: language by language.
    """
    from kernel_surgery.models.padding import token_batches
    from kernel_surgery.subspace.collecting import collect_moments, encode, prompt_states

    layers, encoded = range(model.config.num_hidden_layers), encode(tokenizer, prompts, 1)[0]
    lengths = [len(ids) for ids in encoded]
    old = Slice.of(batches_before(lengths, len(LANGUAGES)), lengths, every)
    found: dict[str, tuple] = {
        BEFORE: (lambda: read_whole(model, tokenizer, encoded, old.batches), old.tokens),
        BODY: (lambda: read_whole(model, tokenizer, encoded, old.batches, whole=False), old.tokens),
    }
    for budget in budgets:
        # A batch ends when one more prompt of its longest's length would not fit. So the slice's prompts alone make
        # the slice's batches again.
        new = Slice.of(token_batches(lengths, budget), lengths, every)
        texts = [prompts[i] for batch in new.batches for i in batch]
        name = OURS if budget == BATCH_TOKENS else f"{OURS}, {budget} tokens"
        found[name] = (partial(prompt_states, model, tokenizer, texts, layers, batch_tokens=budget), new.tokens)
    new = Slice.of(token_batches(lengths, BATCH_TOKENS), lengths, every)
    texts = [prompts[i] for batch in new.batches for i in batch]
    pairs = [SimpleNamespace(prompts={"even": a, "odd": b}) for a, b in zip(texts[::2], texts[1::2], strict=False)]
    return found | {MOMENTS: (lambda: collect_moments(model, tokenizer, pairs, ("even", "odd")), new.tokens)}


def timed(args, about: dict) -> list[dict]:
    """The rows of the times; prints them."""
    from kernel_surgery.models.load import load_model, load_tokenizer, public_name
    from kernel_surgery.problems.generator import problems

    model, tokenizer = load_model(args.model, device="cpu"), load_tokenizer(args.model)
    prompts = [p.prompts[language] for language in LANGUAGES for p in problems("fit", args.problems)]
    tokens = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    off = checked(model, tokenizer, prompts[:: 2 * args.every])
    print(
        f"{about['device']}: {public_name(args.model)}, {len(prompts)} prompts, {tokens} tokens. The bits are those of "
        f"the whole model in the same batches; in batches of {PROMPTS} vectors differ by {off:.1e} of the largest entry"
    )
    methods = calls(model, tokenizer, prompts, args.batch_tokens, args.every)

    cpu: dict[str, list[float]] = {name: [] for name in methods}

    def one(name: str, call: Callable, part: int) -> float:
        began, busy = time.perf_counter(), time.process_time()
        call()
        cpu[name].append((time.process_time() - busy) * 1e6 * tokens / part)
        return (time.perf_counter() - began) * 1e6 * tokens / part

    with progress_bar((args.rounds + 1) * len(methods), "collect", unit="pass") as bar:
        passes = {name: partial(one, name, *method) for name, method in methods.items()}
        times = interleaved(passes, args.rounds, bar.update)
    rows = []
    for name, sample in times.items():
        row = record("collect", "vectors", name, M=len(prompts), d=model.config.hidden_size, dtype="float32")
        row |= {"model": public_name(args.model), "tokens": tokens, "every": args.every, "difference": off}
        row |= percentiles(sample) | ratio(times[BEFORE], sample, "speedup") | {"rounds": args.rounds} | about
        row |= {"cpu_us_p50": statistics.median(cpu[name][1:])}
        row |= ratio(cpu[BEFORE][1:], cpu[name][1:], "cpu_speedup")  # the first round is discarded
        rows.append(row)
        (low, high), (least, most) = ends(row, "speedup"), ends(row, "cpu_speedup")
        print(
            f"{name:<36} {row['us_p50'] / 1e6:>7.2f} s {tokens / row['us_p50'] * 1e6:>8.0f} tokens/s  "
            f"{row['speedup']:.2f} times the speed before ({low:.2f} to {high:.2f}); "
            f"by processor time {row['cpu_us_p50'] / 1e6:.1f} s, {row['cpu_speedup']:.2f} ({least:.2f} to {most:.2f})"
        )
    return rows


# ------------------------------------------------------------------------------------------------- memory


def _memory(field: str) -> int:
    """A size of this process in bytes: "RssAnon" is anonymous, "VmRSS" with mapped files, "VmHWM" the peak of that."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def added(vocabulary: int, how: str, d: int, layers: int, prompts: int) -> int:
    """Bytes that reading random prompts adds to a loaded random Llama, at the peak. Call it in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kernel_surgery.subspace.collecting import prompt_states

    class Ids:
        """A tokenizer of numbers: one token per word."""

        pad_token_id, eos_token_id, padding_side = 0, 0, "left"

        def __call__(self, text):
            from transformers import BatchEncoding

            return BatchEncoding({"input_ids": [int(word) for word in text.split()]})

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=layers, **heads
    )
    model = LlamaForCausalLM(config).eval()
    texts = [" ".join(map(str, range(1, 33 + i % 32))) for i in range(prompts)]
    encoded = [Ids()(text).input_ids for text in texts]

    def read(count: int) -> None:
        if how == BEFORE:
            read_whole(model, Ids(), encoded[:count], batches_before([len(ids) for ids in encoded[:count]], 1))
        else:
            prompt_states(model, Ids(), texts[:count], range(layers))

    read(1)  # what is made once: threads, tables
    ctypes.CDLL(None).malloc_trim(0)
    before = _memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    shared = _memory("VmRSS") - before  # mapped files
    read(prompts)
    return _memory("VmHWM") - shared - before


def forked(cases: Sequence[dict]) -> None:
    """Print `added` of each case, one per line, each in a fork of this process. Raises RuntimeError if one fails."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401  what every fork needs

    torch.set_num_threads(1)
    for case in cases:
        if (child := os.fork()) == 0:
            try:
                print(added(**case), flush=True)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{case} could not be measured: see above")


def weighed(about: dict, d: int = 256, layers: int = 4, prompts: int = 128) -> list[dict]:
    """The rows of the memory; prints them."""
    sizes = {"d": d, "layers": layers, "prompts": prompts}
    cases = [{"how": how, "vocabulary": vocabulary} for how in (BEFORE, OURS) for vocabulary in VOCABULARIES]
    # Every large block is mapped and unmapped for itself: what was freed does not hide what is used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment[_CHILD] = json.dumps([case | sizes for case in cases])
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.collect"]
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for case, peak in zip(cases, done.stdout.split()[-len(cases) :], strict=True):
        row = record("collect", "memory", case["how"], M=prompts, d=d, dtype="float32")
        row |= {"size": case["vocabulary"], "layers": layers, "added_bytes": int(peak)} | about
        rows.append(row)
        what = f"{case['how']:<36} vocabulary {case['vocabulary']:>7}"
        print(f"{what}: adds {row['added_bytes'] / 1e6:>7.1f} MB to the model")
    return rows


def unequal(rows: Sequence[dict]) -> float:
    """How far the largest peak of ours is above the smallest, as a share of it."""
    ours = [row["added_bytes"] for row in rows if (row["case"], row["provider"]) == ("memory", OURS)]
    return max(ours) / min(ours) - 1


def parser() -> Parser:
    """The command line."""
    p = bench_parser("collect", "Time and weigh collect beside a forward pass of the whole model.")
    p.add_argument("--model", default="smollm2")
    p.add_argument("--problems", type=int, default=40, help="in each of five categories (default 40)")
    p.add_argument("--every", type=int, default=5, help="run every so many-th batch (default 5)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--batch-tokens", type=int, nargs="+", default=[BATCH_TOKENS])
    p.add_argument("--only", choices=("time", "memory"))
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the tables. Returns 1 if the peaks of memory differ with the vocabulary by more than `SAME`."""
    if _CHILD in os.environ:
        forked(json.loads(os.environ[_CHILD]))
        return 0
    args, about = parser().parse_args(argv), stamp()
    rows = [] if args.only == "memory" else timed(args, about)
    rows += [] if args.only == "time" else weighed(about)
    keep(args.out, rows)
    speeds = {row["provider"]: row["speedup"] for row in rows if row["case"] == "vectors"}
    more = 0.0 if args.only == "time" else unequal(rows)
    print(json.dumps({"case": "collect", **speeds, "unequal": more, **about}))
    return int(more > SAME)


if __name__ == "__main__":
    main(run)
