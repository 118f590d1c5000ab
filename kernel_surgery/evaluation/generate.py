"""Greedy generation for many prompts: batched and left-padded, with texts that do not depend on the batch."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.progress import shown
from kernel_surgery.evaluation.judging import Generation, text_of
from kernel_surgery.models.before import check_positions
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.padding import padded, padding_id

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return every token id that ends a text.

    These are the generation config's ids (a base model may list several) and the tokenizer's.
    """
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id) if i is not None))


def stored_end_tokens(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return `end_tokens` of a checkpoint whose model is not loaded.

    The ids are those of generation_config.json or, without that file, of config.json, and the tokenizer's.
    """
    file = next((f for f in (folder / "generation_config.json", folder / "config.json") if f.is_file()), None)
    declared = None if file is None else json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id) if i is not None))


def greedy_config(max_new_tokens: int, ends: Sequence[int], pad: int) -> "GenerationConfig":
    """Return a greedy GenerationConfig that sets every option that can change greedy text."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        length_penalty=1.0,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
    )


@contextmanager
def checkpoint_settings_aside(model: "PreTrainedModel") -> Iterator[None]:
    """Give the model a blank generation config while the block runs.

    `generate` fills options that a GenerationConfig leaves unset from the model's own config. Otherwise a repetition
    penalty, forbidden words or a time limit of the checkpoint would stay in force despite do_sample=False, and silently
    change the answers.
    """
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _reporting(texts: int, max_new_tokens: int, advance: Callable[[float], object]) -> "StoppingCriteriaList":
    """Return a stopping criterion that never stops: it reports each new token of a batch as a share of its texts."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Reporting(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: object, **more: object) -> torch.Tensor:
            advance(texts / max_new_tokens)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Reporting()])


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[float], object] = lambda done: None,
    chat: Chat = OFF,
) -> list[Generation]:
    """Generate greedy continuations, in the order of `prompts`.

    max_new_tokens: the budget per text. advance: called with the number of prompts that were just finished; on a
    terminal after every token, with a fraction of it. chat: how the prompts are put to the model.

    Prompts are sorted by length, batched and padded on the left. Positions are counted from the attention mask, so a
    text does not depend on its batch, except for floating-point rounding. Rounding can swap two logits that are almost
    equal.

    Raises KernelSurgeryError for a batch size or budget below 1, for a prompt without tokens, and for a prompt and
    budget that need more positions than the model has.
    """
    for name, value in (("batch size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise KernelSurgeryError(f"{name} must be at least 1, got {value}")
    ends = end_tokens(model, tokenizer)
    pad = padding_id(model, tokenizer, ends)
    config = greedy_config(max_new_tokens, ends, pad)
    encoded = [chat.ids(tokenizer, prompt) for prompt in prompts]
    if empty := [i for i, ids in enumerate(encoded) if not ids]:
        raise KernelSurgeryError(f"prompt {empty[0]} is empty after tokenization: there is nothing to continue")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_positions(positions, map(len, encoded), max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    done: dict[int, Generation] = {}
    decode = text_of(tokenizer, chat)
    with checkpoint_settings_aside(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, mask = padded([encoded[i] for i in batch], pad, "left", model.device)
            more, reported = {}, 0.0

            def step(share: float) -> None:
                nonlocal reported
                reported += share
                advance(share)

            if shown():
                more["stopping_criteria"] = _reporting(len(batch), max_new_tokens, step)
            with torch.no_grad():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
            for i, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((t for t, token in enumerate(row) if token in ends), None)
                new_ids = tuple(row if stop is None else row[:stop])
                done[i] = Generation(new_ids, decode(new_ids), "length" if stop is None else "stop")
            advance(len(batch) - reported)
    return [done[i] for i in range(len(prompts))]
