"""The evaluation against the loop it replaces: python -m bench.evaluation [--out FILE]

The script this project began with puts one prompt at a time to `model.generate`, decodes it and looks for the answer.
`kernel_surgery.eval` batches by length, pads on the left, scores by the strict protocol and judges the language. Both
answer the same problems with the embedded model in one run, in turns; both times include tokenizing, decoding and each
one's own scoring. The gain is batching's: a loop that batched as well would have it too.

Texts first: both must say the same, token for token, but where rounding may swap the two best logits (they are no
further apart than twice what padding on the left changes in them); else the status is 1 and no time is printed.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from bench.timing import ends, interleaved, percentiles, ratio, stamp
from kernel_surgery import cli

LOOP, OURS = "one prompt at a time", "kernel_surgery.eval"
Texts = list[tuple[int, ...]]


def one_at_a_time(model, tokenizer, asked, languages, budget: int, advance: Callable) -> Texts:
    """New token ids of each prompt, without the end token: a prompt, a call, as the first script does it and scores."""
    import torch

    from kernel_surgery.generate import end_tokens
    from kernel_surgery.scoring import expag_check, expag_fat, expag_language

    ends, made = end_tokens(model, tokenizer), []
    for language in languages:
        for problem in asked:
            inputs = tokenizer(problem.prompts[language], return_tensors="pt").to(model.device)
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=budget, do_sample=False)
            ids = out[0, inputs.input_ids.shape[1] :].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            expag_check(text, problem.answer), expag_fat(text, problem.answer), expag_language(text)
            made.append(tuple(ids[:-1] if ids and ids[-1] in ends else ids))
            advance(1)
    return made


def batched(model, tokenizer, asked, languages, budget: int, batch_size: int, advance: Callable) -> Texts:
    """The same by this project's evaluation: `generate`, then `results.score`, a cell a language."""
    from kernel_surgery.generate import generate
    from kernel_surgery.results import score, text_of

    made, decode = [], text_of(tokenizer)
    for language in languages:
        prompts = [problem.prompts[language] for problem in asked]
        options = {"max_new_tokens": budget, "batch_size": batch_size, "advance": advance}
        texts = generate(model, tokenizer, prompts, **options)
        for problem, text in zip(asked, texts, strict=True):
            score(problem, language, "original", text, decode)
        made += [text.ids for text in texts]
    return made


def may_swap(model, tokenizer, prompt: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether rounding explains that two greedy continuations part: at the first token that differs, the logits of the
    two choices are no further apart than twice what padding on the left changes in them."""
    import torch

    from kernel_surgery.generate import end_tokens

    end = end_tokens(model, tokenizer)[0]
    at = next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    choices = [ids[at] if at < len(ids) else end for ids in (one, other)]
    given, found = tokenizer(prompt).input_ids + list(one[:at]), []
    for padding in (0, 1, 7, 16):
        ids = torch.tensor([[end] * padding + given], device=model.device)
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1, choices])
    spread = max(float((padded - found[0]).abs().max()) for padded in found[1:])
    return float((found[0][0] - found[0][1]).abs()) <= 2 * spread


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m bench.evaluation", description="Time the evaluation against a one-by-one loop.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument("--problems", type=int, default=40, help="per category (default 40: 200 a language)")
    p.add_argument("--languages", default="en,zh")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--device", default="auto")
    p.add_argument("--rounds", type=int, default=6)
    return p


def run(argv: list[str] | None = None) -> int:
    """Print both times and their ratio; 1 if the texts differ by more than rounding explains."""
    args = parser().parse_args(argv)
    languages, device, budget = cli.parse_languages(args.languages), cli.parse_device(args.device), args.max_new_tokens

    import torch

    from kernel_surgery.language import judge
    from kernel_surgery.problems import problems

    model, tokenizer = cli.load_model("polyglot", torch.float32, device), cli.load_tokenizer("polyglot")
    asked, about = problems("test", args.problems), stamp(device)
    judge("The language identifier is loaded before anything is timed.", "en")
    calls = {
        LOOP: lambda advance: one_at_a_time(model, tokenizer, asked, languages, budget, advance),
        OURS: lambda advance: batched(model, tokenizer, asked, languages, budget, args.batch_size, advance),
    }
    texts: dict[str, Texts] = {}
    prompts = [problem.prompts[language] for language in languages for problem in asked]
    with cli.bar((args.rounds + 1) * len(calls) * len(prompts), "evaluation", unit="text") as bar:

        def one(name: str) -> float:
            began = time.perf_counter()
            texts[name] = calls[name](bar.update)
            return (time.perf_counter() - began) * 1e6

        times = interleaved({name: lambda name=name: one(name) for name in calls}, args.rounds)
    parted = [i for i, (one, other) in enumerate(zip(texts[LOOP], texts[OURS], strict=True)) if one != other]
    wrong = [i for i in parted if not may_swap(model, tokenizer, prompts[i], texts[LOOP][i], texts[OURS][i])]
    print(f"{len(prompts)} texts, {len(prompts) - len(parted)} the same, {len(parted) - len(wrong)} parted by rounding")
    for i in wrong:
        print(f"  other text than alone: {prompts[i]!r}")
    if wrong:
        return 1
    rows, tokens = [], sum(map(len, texts[OURS]))
    for name, taken in times.items():
        row = {"case": "evaluation", "provider": name, "texts": len(prompts), "tokens": tokens, "batch": 1}
        row |= {"batch": args.batch_size if name == OURS else 1, "parted_by_rounding": len(parted)}
        row |= percentiles(taken) | ratio(times[LOOP], taken) | about
        rows.append(row)
        low, high = ends(row)
        print(
            f"{name:<22} batch {row['batch']:>3}  {row['us_p50'] / 1e6:>7.2f} s  {tokens / row['us_p50'] * 1e6:>8.0f} "
            f"tokens/s  {row['ratio']:.2f} times the loop's speed ({low:.2f} to {high:.2f})"
        )
    if args.out:
        cli.write_atomic(args.out, json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"case": "evaluation", "ratio": rows[1]["ratio"], **about}))
    return 0


if __name__ == "__main__":
    cli.main(run)
