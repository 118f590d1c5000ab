"""Greedy texts of two programs: where they differ, the two best tokens must be as good as equal.

Beside a prompt that is alone in its batch, each log probability is off by at most the measured noise of its side. The
difference of two logits, which is that of their log probabilities, is therefore off by twice that, on each side.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from kernel_surgery.models.padding import padded


def log_probabilities(model, tokenizer, prompt, ids):
    """`[tokens of the text, vocabulary]`: what transformers gives for each token of a text, alone in its batch."""
    before = tokenizer(prompt).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + list(ids)])).logits[0]
    return logits[len(before) - 1 : -1].log_softmax(-1)


def noise_of_padding(batch_model, model, tokenizer, asked, own):
    """The largest difference of a log-probability, over all tokens of all texts, that a padded batch makes."""
    before = [tokenizer(prompt).input_ids for prompt in asked]
    full = [ids + list(text.ids) for ids, text in zip(before, own, strict=True)]
    ids, mask = padded(full, tokenizer.pad_token_id, "left", "cpu")
    with torch.no_grad():
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        batch = batch_model(input_ids=ids, attention_mask=mask, position_ids=position).logits.log_softmax(-1)
    return max(
        float((rows[-len(text.ids) - 1 : -1] - log_probabilities(model, tokenizer, prompt, text.ids)).abs().max())
        for rows, prompt, text in zip(batch, asked, own, strict=True)
    )


def noise_of_best(best_of, model, tokenizer, asked, own):
    """The largest difference of a log-probability between an engine and transformers, over the best of each token.

    best_of: of lists of token ids, {token: log-probability} of the best at every place of each.
    """
    full = [tokenizer(prompt).input_ids + list(text.ids) for prompt, text in zip(asked, own, strict=True)]
    return max(
        abs(held - float(row[token]))
        for places, prompt, text in zip(best_of(full), asked, own, strict=True)
        for row, best in zip(
            log_probabilities(model, tokenizer, prompt, text.ids), places[-len(text.ids) :], strict=True
        )
        for token, held in best.items()
    )


def gap(model, tokenizer, prompt, own, other):
    """The difference of the two best logits at the token after which `own` and the text `other` part.

    If that is in the middle of a letter, which the text does not show, it is the least over the tokens of the letter.
    """
    ids = [*own.ids, tokenizer.eos_token_id]  # they may part because one ends
    at = max(t for t in range(len(ids)) if other.startswith(tokenizer.decode(ids[:t])))
    end = next(t for t in range(at + 1, len(ids) + 1) if not tokenizer.decode(ids[:t]).endswith("\ufffd"))
    best = log_probabilities(model, tokenizer, prompt, ids[:end])[at:].topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def near_ties(model, tokenizer, asked, own, others, theirs):
    """How many of the texts `others` differ from our own. All of them must be near ties.

    own: `Generation`s of transformers. theirs: the noise of the other side. Prints what was measured.
    """
    ours = noise_of_padding(model, model, tokenizer, asked, own)
    gaps = [
        gap(model, tokenizer, prompt, one, other)
        for prompt, one, other in zip(asked, own, others, strict=True)
        if other != one.text
    ]
    print(f"noise {theirs:.1e} and {ours:.1e}; texts that differ: {len(gaps)}, gaps {gaps}")
    assert all(found <= 2 * (ours + theirs) for found in gaps)
    # Teeth: another text is not called a near tie.
    assert gap(model, tokenizer, asked[0], own[0], own[1].text) > 2 * (ours + theirs)
    return len(gaps)


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
