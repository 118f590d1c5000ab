"""Load the model that will answer, after everything that its files can show."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.models.before import check_config, check_positions, check_stored
from kernel_surgery.models.load import load_model, load_tokenizer, local_folder, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_checked(
    name: str,
    where: tuple[torch.dtype, torch.device],
    prompts: Iterable[str],
    new_tokens: int,
    check: Callable[[Path, dict[str, Any]], object],
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model and its tokenizer. Nothing large is read until the model is known to do.

    name: as in `models.load.load_model`. where: its dtype and device. prompts: what it will be asked. new_tokens: the
    most that it will be asked to write. check: called with its folder and configuration before it is loaded.

    Raises ModelError for an unknown architecture or too few positions, and what `check` and the loaders raise.
    """
    source = local_folder(resolve_model(name))
    config = check_config(source)
    check_stored(source, config)
    check(source, config)
    tokenizer = load_tokenizer(str(source))
    check_positions(config.get("max_position_embeddings"), tokenizer, prompts, new_tokens)
    return load_model(str(source), *where), tokenizer
