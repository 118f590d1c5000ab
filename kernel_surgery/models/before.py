"""What can be known before a model is loaded: from its configuration, its tokenizer and the headers of its files."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.common.errors import ModelError
from kernel_surgery.files.tensorfile import Layout
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.load import (
    check_device_map,
    load_model,
    load_tokenizer,
    local_folder,
    read_config,
    resolve_model,
)
from kernel_surgery.models.stored import sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_config(folder: Path) -> dict[str, Any]:
    """Return config.json as a dict. Raises ModelError if it cannot be used or names an unknown architecture."""
    config = read_config(folder)
    layout_named(config["model_type"])
    return config


def check_stored(folder: Path, found: list[Layout] | None = None) -> None:
    """Check the headers of the weight files: whole, and with every tensor that is read or edited.

    found: the headers, if they were read before.

    Raises CheckpointError for a damaged file and for a tensor that is missing, such as in an incomplete download.
    """
    sampled(folder, found)


def check_positions(
    positions: int | None, lengths: Iterable[int], new_tokens: int = 0, option: str = "--max-new-tokens"
) -> None:
    """Raise ModelError if a prompt and the tokens after it need more positions than the model was made for.

    positions: max_position_embeddings of the configuration; None if it has no such limit. Beyond it a model with rotary
    positions still runs, and writes nonsense. lengths: of the prompts, in tokens.
    """
    longest = max(lengths, default=0)
    if positions is None or longest + new_tokens <= positions:
        return
    if longest >= positions or not new_tokens:
        raise ModelError(f"the longest prompt has {longest} tokens, but the model has {positions} positions.")
    raise ModelError(
        f"prompts of up to {longest} tokens and {new_tokens} new ones are longer than the model's {positions} "
        f"positions. Use {option} {positions - longest} at most."
    )


def load_checked(
    name: str,
    where: tuple[torch.dtype, torch.device],
    prompts: Iterable[str],
    new_tokens: int,
    check: Callable[[Path, dict[str, Any]], object],
    device_map: str | None = None,
    chat: Chat = OFF,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model and its tokenizer. Nothing large is read until the model is known to do.

    name: as in `models.load.load_model`. where: its dtype and device. prompts: what it will be asked. new_tokens: the
    most that it will be asked to write. check: called with its folder and configuration before it is loaded.
    device_map: as in `models.load.load_model`. chat: how the prompts will be put.

    Raises ModelError for an unknown architecture or too few positions, and what `check` and the loaders raise.
    """
    check_device_map(device_map)
    source, _, tokenizer, _ = check_files(name, prompts, new_tokens, check, chat)
    return load_model(str(source), *where, device_map), tokenizer


def check_files(
    name: str,
    prompts: Iterable[str],
    new_tokens: int,
    check: Callable[[Path, dict[str, Any]], object],
    chat: Chat = OFF,
) -> tuple[Path, dict[str, Any], "PreTrainedTokenizerBase", int]:
    """Check a model's files as `load_checked` does, and load no weights.

    Returns its folder, its configuration, its tokenizer, and the tokens of the longest prompt (0 without prompts).
    """
    source = local_folder(resolve_model(name))
    config = check_config(source)
    check_stored(source)
    check(source, config)
    tokenizer = load_tokenizer(str(source))
    lengths = [len(chat.ids(tokenizer, prompt)) for prompt in prompts]
    check_positions(config.get("max_position_embeddings"), lengths, new_tokens)
    return source, config, tokenizer, max(lengths, default=0)
