"""Padding a batch of prompts. Padding is masked everywhere, so any token id that the model has will do."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def padding_id(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ends: Iterable[int] = ()) -> int:
    """Return a token id to pad with: the tokenizer's, or else the first of `ends`, or else 0.

    Some tokenizers name a padding token beyond the model's embedding. It would be an IndexError there.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    wanted = (tokenizer.pad_token_id, *ends, tokenizer.eos_token_id)
    return next((i for i in wanted if i is not None and 0 <= i < rows), 0)


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the prompts' indices in batches of at most `batch_tokens` tokens, padding included.

    lengths: of the prompts, in tokens. A batch has (its longest prompt) x (its prompts) tokens. A longer prompt is a
    batch of its own. The longest come first: if memory runs out, it does so at once. Prompts of one length keep their
    order, so equal prompts give equal batches.
    """
    batches: list[list[int]] = []
    width = 0  # of the last batch: its first prompt is its longest
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def padded(encoded: Sequence[Sequence[int]], pad: int, side: str, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both [batch, tokens] int64; the mask is 1 for tokens, 0 for padding. side: left or right."""
    width = max(map(len, encoded))
    ids, mask = [], []
    for tokens in encoded:
        fill = width - len(tokens)
        left, right = (fill, 0) if side == "left" else (0, fill)
        ids.append([pad] * left + list(tokens) + [pad] * right)
        mask.append([0] * left + [1] * len(tokens) + [0] * right)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
