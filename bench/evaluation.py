"""Time the evaluation beside the loop that it replaces: python -m bench.evaluation [--out FILE]

Three methods answer the same problems with the embedded model, in turns in one run:

    one prompt at a time    the loop of the script that this project began with: `model.generate` for one prompt, then
                            decode the text and look for the answer
    the loop, batched       the same loop, batched by hand: problems in order, padded by the tokenizer, scored alike
    kernel_surgery.eval     batches by length, pads on the left, scores strictly and judges the language

The times include tokenizing, decoding and each method's own scoring.

Texts come first. All methods must give the same texts, token for token. A text may differ only where rounding can swap
the two best logits: they are at most twice as far apart as padding on the left moves them. Otherwise the benchmark
prints no times and returns 1.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.model import weight_bytes
from bench.parsing import bench_parser
from bench.store import keep, record
from bench.timing import copy_bandwidth, ends, interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.load import load_model, load_tokenizer, parse_device
from kernel_surgery.problems.generator import parse_languages

LOOP, BATCHED_LOOP, OURS = "one prompt at a time", "the loop, batched", "kernel_surgery.eval"
Texts = list[tuple[int, ...]]


def by_hand(model, tokenizer, asked, languages, budget: int, batch_size: int, advance: Callable) -> Texts:
    """The new token ids of each prompt, without the end token, by plain `model.generate`.

    Scored like the script that this project began with. A batch size of 1 is that script's loop.
    """
    import torch

    from kernel_surgery.evaluation.generate import end_tokens
    from kernel_surgery.scoring.expag import expag_check, expag_fat, expag_language

    ends, texts = end_tokens(model, tokenizer), []
    for language in languages:
        for start in range(0, len(asked), batch_size):
            chosen = asked[start : start + batch_size]
            prompts = [problem.prompts[language] for problem in chosen]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=budget, do_sample=False)
            new = out[:, inputs.input_ids.shape[1] :].tolist()
            for problem, ids, text in zip(
                chosen, new, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                expag_check(text, problem.answer), expag_fat(text, problem.answer), expag_language(text)
                stop = next((t for t, token in enumerate(ids) if token in ends), len(ids))
                texts.append(tuple(ids[:stop]))
            advance(len(chosen))
    return texts


def batched(model, tokenizer, asked, languages, budget: int, batch_size: int, advance: Callable) -> Texts:
    """The same by this project's evaluation: `generate`, then `judging.score`, one language after another."""
    from kernel_surgery.evaluation.generate import generate
    from kernel_surgery.evaluation.judging import score, text_of

    all_ids, decode = [], text_of(tokenizer)
    for language in languages:
        prompts = [problem.prompts[language] for problem in asked]
        options = {"max_new_tokens": budget, "batch_size": batch_size, "advance": advance}
        texts = generate(model, tokenizer, prompts, **options)
        for problem, text in zip(asked, texts, strict=True):
            score(problem, language, "original", text, decode)
        all_ids += [text.ids for text in texts]
    return all_ids


def may_swap(model, tokenizer, prompt: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether rounding explains why two greedy continuations differ.

    It does if, at the first token that differs, the logits of the two choices are at most twice as far apart as padding
    on the left moves them.
    """
    import torch

    from kernel_surgery.evaluation.generate import end_tokens

    end = end_tokens(model, tokenizer)[0]
    at = next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    choices = [ids[at] if at < len(ids) else end for ids in (one, other)]
    prefix, logits = tokenizer(prompt).input_ids + list(one[:at]), []
    for padding in (0, 1, 7, 16):
        ids = torch.tensor([[end] * padding + prefix], device=model.device)
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1, choices])
    spread = max(float((padded - logits[0]).abs().max()) for padded in logits[1:])
    return float((logits[0][0] - logits[0][1]).abs()) <= 2 * spread


def parser() -> Parser:
    """The command line."""
    p = bench_parser("evaluation", "Time the evaluation beside a loop over single prompts.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument(
        "--problems", type=int, default=40, help="problems per category (default: 40, which is 200 per language)"
    )
    p.add_argument("--languages", default="en,zh")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=6)
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the times and their ratios. Returns 1 if texts differ by more than rounding explains."""
    args = parser().parse_args(argv)
    languages, device, budget = parse_languages(args.languages), parse_device(args.device), args.max_new_tokens

    import torch

    from kernel_surgery.problems.generator import problems
    from kernel_surgery.scoring.language import judge

    model, tokenizer = load_model("polyglot", torch.float32, device), load_tokenizer("polyglot")
    asked, about = problems("test", args.problems), stamp(device)
    bandwidth, weights = copy_bandwidth(device), weight_bytes(model)
    print(
        f"{about['device']}: {len(asked) * len(languages)} texts of the embedded model; at a copy's {bandwidth:.0f} "
        f"GB/s, reading its {weights / 1e6:.1f} MB takes {weights / bandwidth / 1e3:.0f} us per step at any batch size"
    )
    judge("The language identifier is loaded before anything is timed.", "en")
    calls = {
        LOOP: lambda advance: by_hand(model, tokenizer, asked, languages, budget, 1, advance),
        BATCHED_LOOP: lambda advance: by_hand(model, tokenizer, asked, languages, budget, args.batch_size, advance),
        OURS: lambda advance: batched(model, tokenizer, asked, languages, budget, args.batch_size, advance),
    }
    texts: dict[str, Texts] = {}
    prompts = [problem.prompts[language] for language in languages for problem in asked]
    with progress_bar((args.rounds + 1) * len(calls) * len(prompts), "evaluation", unit="text") as bar:

        def one(name: str) -> float:
            began = time.perf_counter()
            texts[name] = calls[name](bar.update)
            return (time.perf_counter() - began) * 1e6

        times = interleaved({name: lambda name=name: one(name) for name in calls}, args.rounds)
    different, wrong = {}, 0
    for name, ids in texts.items():
        different[name] = [i for i, (one, other) in enumerate(zip(texts[LOOP], ids, strict=True)) if one != other]
        other = [i for i in different[name] if not may_swap(model, tokenizer, prompts[i], texts[LOOP][i], ids[i])]
        wrong += len(other)
        if name != LOOP:
            same, swapped = len(prompts) - len(different[name]), len(different[name]) - len(other)
            print(f"{name}: {len(prompts)} texts, {same} the same as alone, {swapped} that differ by rounding")
        for i in other:
            print(f"  not the same text as alone: {prompts[i]!r}")
    if wrong:
        return 1
    rows = []
    for name, sample in times.items():
        tokens = sum(map(len, texts[name]))
        row = record("evaluation", "polyglot", name, M=len(prompts), d=model.config.hidden_size, dtype="float32")
        row |= {"tokens": tokens, "batch": 1 if name == LOOP else args.batch_size}
        row |= {"parted_by_rounding": len(different[name]), "cache": "warm"}
        row |= percentiles(sample) | ratio(times[LOOP], sample, "speedup") | about
        rows.append(row)
        low, high = ends(row, "speedup")
        print(
            f"{name:<22} batch {row['batch']:>3}  {row['us_p50'] / 1e6:>7.2f} s  {tokens / row['us_p50'] * 1e6:>8.0f} "
            f"tokens/s  {row['speedup']:.2f} times the loop's speed ({low:.2f} to {high:.2f})"
        )
    keep(args.out, rows)
    print(json.dumps({"case": "evaluation", "speedups": {r["provider"]: r["speedup"] for r in rows}, **about}))
    return 0


if __name__ == "__main__":
    main(run)
