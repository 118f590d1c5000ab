"""The evaluation against the loop it replaces: python -m bench.evaluation [--out FILE]

The script this project began with puts one prompt at a time to `model.generate`, decodes it and looks for the answer.
`kernel_surgery.generate` batches by length, pads on the left and cuts at the end token. Both answer the same problems
of the embedded model in one run, in turns; both times include tokenizing, decoding and scoring. Before any time is
printed the texts are compared: both must say the same, word for word, but for choices that rounding may swap (the two
best logits closer than twice the difference that padding makes there).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from kernel_surgery import cli

LOOP, OURS = "one prompt at a time", "kernel_surgery.generate"


def one_at_a_time(model, tokenizer, prompts: list[str], budget: int, advance) -> list[tuple[int, ...]]:
    """New token ids of each prompt, without the end token: a prompt, a call, as the first script does it."""
    import torch

    from kernel_surgery.generate import end_tokens

    ends, made = end_tokens(model, tokenizer), []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=budget, do_sample=False)
        ids = out[0, inputs.input_ids.shape[1] :].tolist()
        made.append(tuple(ids[:-1] if ids and ids[-1] in ends else ids))
        advance(1)
    return made


def may_swap(model, tokenizer, prompt: str, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether rounding explains that two greedy continuations part: at the first token that differs, the logits of the
    two choices are no further apart than twice what padding on the left changes in them."""
    import torch

    at = next((t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    choices = [ids[at] if at < len(ids) else ends[0] for ids in (one, other)]
    given = tokenizer(prompt).input_ids + list(one[:at])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    found = []
    with torch.no_grad():
        for padding in (0, 1, 7, 16):
            ids = torch.tensor([[pad] * padding + given], device=model.device)
            mask = torch.ones_like(ids)
            mask[:, :padding] = 0
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            found.append(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0, -1, choices])
    spread = max(float((other - found[0]).abs().max()) for other in found[1:])
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
    p.add_argument("--rounds", type=int, default=1)
    return p


def run(argv: list[str] | None = None) -> int:
    """Print both times and their ratio; 1 if the texts differ by more than rounding explains."""
    args = parser().parse_args(argv)
    languages, device = cli.parse_languages(args.languages), cli.parse_device(args.device)

    import torch

    from kernel_surgery.generate import generate
    from kernel_surgery.problems import problems
    from kernel_surgery.scoring import judge_text

    model, tokenizer = cli.load_model("polyglot", torch.float32, device), cli.load_tokenizer("polyglot")
    asked = problems("test", args.problems)
    prompts = [(p.prompts[language], p) for language in languages for p in asked]
    texts = [prompt for prompt, _ in prompts]

    def batched(advance) -> list[tuple[int, ...]]:
        options = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "advance": advance}
        return [g.ids for g in generate(model, tokenizer, texts, **options)]

    calls = {LOOP: lambda advance: one_at_a_time(model, tokenizer, texts, args.max_new_tokens, advance), OURS: batched}
    times, found = {name: [] for name in calls}, {}
    with cli.bar(args.rounds * len(calls) * len(texts), "evaluation", unit="text") as bar:
        for _ in range(args.rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                found[name] = call(bar.update)
                verdicts = [
                    judge_text(tokenizer.decode(ids, skip_special_tokens=True), p.answer)
                    for ids, (_, p) in zip(found[name], prompts, strict=True)
                ]
                times[name].append(time.perf_counter() - began)
    return verdicts


if __name__ == "__main__":
    cli.main(run)
