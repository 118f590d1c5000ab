"""Check a strength for each request in vLLM, then time vLLM with the edit in every mode: python -m bench.per_request

It needs a CUDA device, and vLLM with its V2 model runner. `make gpu PARTS=vllm` runs it.

    strengths    requests of one batch ask for strengths 0, 1 and 0.5 in turns, three times, so that every prompt has
                 each strength once. Each must get the text of an engine whose own strength that is, and at 0 the
                 text of an engine without the plugin.
    cache        one prompt at strength 0, 1, 0, the engine's and 1, one after the other. The prefix cache may be used
                 only by a request whose strength was asked before.
    throughput   `bench.engines`: original, fused, lora and baked beside each other. Only if nothing above is wrong.

Two texts that differ are a near tie if the two best log probabilities at that token are closer than rounding. The
rounding is measured: how much the original's log probabilities change when each prompt is alone in its batch. An edit
may change them by twice that (docs/engines.md). Near ties are counted. If the edit itself moves a request by less than
the limit, nothing could be seen, and that is a fault too.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import PLUGIN, REQUEST_STRENGTH

STRENGTHS = (0.0, 1.0, 0.5)
CACHED = (0.0, 1.0, 0.0, None, 1.0)  # one after the other; None: the engine's own strength
ENGINE = 1.0  # that strength
INSTALL = "pip install vllm, then pip install --no-deps -e . && pip install py3langid matplotlib scipy pytest"


@dataclass(frozen=True)
class Text:
    """A greedy text of an engine.

    logs: the log probability of every token. gaps: how far the second best lies below it. cached: how many tokens of
    the prompt came from the prefix cache.
    """

    ids: tuple[int, ...]
    logs: tuple[float, ...]
    gaps: tuple[float, ...]
    cached: int = 0


# From prompts and the strength that each asks for (None: none) to texts, with the prefix cache as it is.
Ask = Callable[[Sequence[Sequence[int]], Sequence[float | None]], list[Text]]


def lacking() -> str | None:
    """What is missing here to run this, with the next step. None if nothing is."""
    import torch

    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return f"vLLM is not installed here. In an environment of its own: {INSTALL} (docs/engines.md, Installing)"
    if not (Path(spec.origin).parent / "v1" / "worker" / "gpu" / "model_states").is_dir():
        return "this vLLM has no V2 model runner. Install one that docs/engines.md names: pip install -U vllm"
    if PLUGIN not in {point.name for point in entry_points(group="vllm.general_plugins")}:
        return "vLLM cannot find the plugin, because this package is not installed: pip install --no-deps -e ."
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    return None


def shared(one: Text, other: Text) -> int:
    """How many tokens two texts share before they part."""
    pairs = zip(one.ids, other.ids, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(one.ids))


def moved(one: Text, other: Text) -> float:
    """The largest difference of two texts' log probabilities, where both had the same tokens before."""
    end = min(shared(one, other) + 1, len(one.ids))
    return max(abs(a - b) for a, b in zip(one.logs[:end], other.logs[:end], strict=True))


@dataclass
class Tally:
    """What comparisons found. limit: the largest difference of a log probability that is rounding."""

    limit: float
    same: int = 0  # the same tokens
    bits: int = 0  # of these, with the same log probabilities too
    ties: int = 0
    faults: tuple[str, ...] = ()

    def compare(self, name: str, found: Text, wanted: Text) -> None:
        """Count a text that must be `wanted` within rounding."""
        at = shared(found, wanted)
        off = max((abs(a - b) for a, b in zip(found.logs[:at], wanted.logs[:at], strict=True)), default=0.0)
        if off > self.limit:
            self.faults += (f"{name}: a log probability is off by {off:.2e}, at most {self.limit:.2e} is rounding",)
        elif at == len(wanted.ids):
            self.same += 1
            self.bits += found.logs == wanted.logs
        # Each of the two best may move by the limit.
        elif min(found.gaps[at], wanted.gaps[at]) <= 2 * self.limit:
            self.ties += 1
        else:
            self.faults += (f"{name}: another token at {at}, and the best two are {wanted.gaps[at]:.2e} apart",)


def rounding(together: Iterable[Text], alone: Iterable[Text]) -> float:
    """The limit: twice what the original's log probabilities change with the batch, or their own rounding."""
    pairs = list(zip(together, alone, strict=True))
    largest = max(abs(log) for one, _ in pairs for log in one.logs)
    ends = [(a, b, shared(a, b)) for a, b in pairs]
    noise = max((abs(x - y) for a, b, end in ends for x, y in zip(a.logs[:end], b.logs[:end], strict=True)), default=0)
    return 2 * max(noise, 2.0**-23 * largest)  # float32, in which an engine computes them


def check_strengths(ask: Ask, prompts: Sequence[Sequence[int]], wanted: dict[float, list[Text]], tally: Tally) -> None:
    """Ask for the strengths in turns, three times. wanted: {strength: the texts of an engine that has it}."""
    for first in range(len(STRENGTHS)):
        asked = [STRENGTHS[(first + i) % len(STRENGTHS)] for i in range(len(prompts))]
        for i, text in enumerate(ask(prompts, asked)):
            tally.compare(f"prompt {i} at strength {asked[i]:g}", text, wanted[asked[i]][i])
    for i in range(len(prompts)):
        effect = moved(wanted[0.0][i], wanted[1.0][i])
        if effect <= tally.limit:
            tally.faults += (f"prompt {i}: the edit moves it by {effect:.2e}, which could not be told from rounding",)


def check_cache(ask: Ask, prompt: Sequence[int], wanted: dict[float, Text], tally: Tally) -> list[int]:
    """Ask one prompt at the strengths of CACHED. Return the number of tokens that came from the cache each time."""
    seen, cached = set(), []
    for number, strength in enumerate(CACHED):
        (text,) = ask([prompt], [strength])
        name = f"request {number} of one prompt, at strength {strength if strength is not None else 'of the engine'}"
        tally.compare(name, text, wanted[ENGINE if strength is None else strength])
        if text.cached and strength not in seen:
            tally.faults += (f"{name}: {text.cached} tokens of another strength came from the prefix cache",)
        if not text.cached and strength in seen:
            tally.faults += (f"{name}: the prefix cache was not used, so nothing is shown of it",)
        seen.add(strength)
        cached.append(text.cached)
    return cached


def asking(llm, tokens: int, fresh: bool) -> Ask:
    """`Ask` of a `vllm.LLM`. fresh: empty the prefix cache first."""
    from vllm import SamplingParams

    def ask(prompts, strengths):
        if fresh and not llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use")
        extra = [None if strength is None else {REQUEST_STRENGTH: strength} for strength in strengths]
        fixed = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "logprobs": 2, "detokenize": False}
        params = [SamplingParams(extra_args=own, **fixed) for own in extra]
        outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        return [text_of(output) for output in outputs]

    return ask


def text_of(output) -> Text:
    """The text of a `vllm.RequestOutput`."""
    written = output.outputs[0]
    logs = [held[token].logprob for token, held in zip(written.token_ids, written.logprobs, strict=True)]
    others = [
        max(other.logprob for name, other in held.items() if name != token)
        for token, held in zip(written.token_ids, written.logprobs, strict=True)
    ]
    gaps = tuple(a - b for a, b in zip(logs, others, strict=True))
    return Text(tuple(written.token_ids), tuple(logs), gaps, output.num_cached_tokens or 0)


def parser() -> Parser:
    """The command line."""
    p = bench_parser("per_request", "Check a strength for each request in vLLM, then time every mode.")
    p.add_argument("--texts", type=int, default=24, help="prompts in a batch (default 24)")
    p.add_argument("--tokens", type=int, default=32, help="tokens of each text (default 32)")
    p.add_argument("--rounds", type=int, default=2, help="of the timing; 0 times nothing (default 2)")
    p.add_argument("--out", type=Path, help="JSON file for the rows; the times go to engines.json beside it")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print what was compared and every fault. Returns 1 if there is one; then nothing is timed."""
    args = parser().parse_args(argv)

    import torch

    from bench import engines
    from kernel_surgery.engines import offline
    from kernel_surgery.engines.variants import variants
    from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE, load_tokenizer
    from kernel_surgery.problems.generator import problems
    from kernel_surgery.subspace.artifact import Subspace

    tokenizer, subspace = load_tokenizer("polyglot"), Subspace.load(POLYGLOT_SUBSPACE)
    asked = [p.prompts[language] for p in problems("test", args.texts) for language in ("en", "zh")][: args.texts]
    prompts = [tokenizer(prompt).input_ids for prompt in asked]
    if missing := lacking():
        raise UserError(f"{missing}. Nothing was run.")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    about, engine = stamp("cuda", "vllm"), offline.require_vllm()
    options = offline.EngineOptions(max(map(len, prompts)) + args.tokens, torch.float32, 1)
    options = replace(options, more={"enforce_eager": True, "enable_prefix_caching": True})
    nothing = [None] * len(prompts)
    with variants(["original", "fused"], POLYGLOT, subspace, ENGINE) as (made, _):
        with offline.started(made["original"], options) as running:
            ask = asking(running.llm, args.tokens, fresh=True)
            original = ask(prompts, nothing)
            tally = Tally(rounding(original, [ask([prompt], [None])[0] for prompt in prompts]))
        with offline.started(made["fused"], options) as running:
            ask, wanted = asking(running.llm, args.tokens, fresh=True), {}
            for strength in (*(s for s in STRENGTHS if s != ENGINE), ENGINE):  # the engine's own comes last
                offline.set_strength(running.llm, strength)
                wanted[strength] = ask(prompts, nothing)
            for i, (found, text) in enumerate(zip(wanted[0.0], original, strict=True)):
                tally.compare(f"prompt {i}, an engine of strength 0", found, text)
            check_strengths(ask, prompts, wanted | {0.0: original}, tally)
            longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
            texts = {strength: found[longest] for strength, found in wanted.items()}
            offline.set_strength(running.llm, ENGINE)  # it has that strength already; this empties the prefix cache
            cached = check_cache(asking(running.llm, args.tokens, fresh=False), prompts[longest], texts, tally)
    row = record("per_request", "polyglot", engine, M=len(prompts), d=subspace.d_model, k=subspace.rank, graph=False)
    row |= {"dtype": "float32", "tokens": args.tokens, "limit": tally.limit, "same": tally.same, "bits": tally.bits}
    keep(args.out, [row | {"ties": tally.ties, "cached": cached, "faults": list(tally.faults)} | about])
    print(f"{engine}: {tally.same} texts the same, {tally.bits} of them to the bit, {tally.ties} near ties")
    print(f"limit {tally.limit:.1e} nats; tokens from the cache at strengths {CACHED}: {cached}")
    print("\n".join(f"fault: {fault}" for fault in tally.faults))
    print(json.dumps({"case": "per_request", "faults": len(tally.faults), **about}))
    if tally.faults or not args.rounds:
        return int(bool(tally.faults))
    out = ["--out", str(args.out.with_name("engines.json"))] if args.out else []
    return engines.run(["--model", "polyglot", "--rounds", str(args.rounds), *out])


if __name__ == "__main__":
    main(run)
