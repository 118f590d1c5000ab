"""Texts of two runs that differ: by a near tie of two logits, which rounding may swap, or by something else."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def first_difference(one, other):
    """The index of the first token that differs, or None. An end of one of them counts as a token."""
    longest = max(len(one), len(other))
    padded = [[*tokens, *[None] * (longest + 1 - len(tokens))] for tokens in (one, other)]
    return next((i for i, (a, b) in enumerate(zip(*padded, strict=True)) if a != b), None)


def not_near_ties(model, tokenizer, end: int, edited: Callable[[str], AbstractContextManager], one, other):
    """(how many texts differ, the differences that are no near ties). one, other: samples.

    A near tie: where the texts part, both tokens' logits, in float64, lie within four times the float32 error of the
    logits there. Each of two runs may be off by the error, at either token.
    """
    by_key = {(s["mode"], s["language"], s["id"]): s for s in other}
    assert len(by_key) == len(other) == len(one)
    exact = type(model)(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    differing, wrong = 0, []
    for sample in one:
        twin = by_key[sample["mode"], sample["language"], sample["id"]]
        at = first_difference(sample["tokens"], twin["tokens"])
        if at is None:
            assert sample["text"] == twin["text"] and sample["correct"] == twin["correct"]
            continue
        differing += 1
        ids = tokenizer(sample["prompt"]).input_ids + sample["tokens"][:at]
        pair = [s["tokens"][at] if at < len(s["tokens"]) else end for s in (sample, twin)]
        rows = []
        for kind in (model, exact):
            with edited(sample["mode"], kind), torch.no_grad():
                rows.append(kind(input_ids=torch.tensor([ids])).logits[0, -1].double())
        error = float((rows[0] - rows[1]).abs().max())
        gap = float((rows[1][pair[0]] - rows[1][pair[1]]).abs())
        if gap > 4 * error:
            wrong.append({"sample": sample["id"], "mode": sample["mode"], "at": at, "gap": gap, "error": error})
    return differing, wrong
