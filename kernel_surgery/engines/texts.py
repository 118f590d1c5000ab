"""What an engine writes, whichever it is: vLLM in this process (`engines.offline`), or a server (`engines.server`)."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kernel_surgery.common.errors import UserError

TRANSFORMERS, VLLM, SERVER = "transformers", "vllm", "openai"
ENGINES = (TRANSFORMERS, VLLM, SERVER)


@dataclass(frozen=True)
class EngineText:
    """One greedy text: its token ids without the end token, and "stop" or "length".

    text: as the engine decoded it, where the ids were made from it; else None.
    """

    ids: tuple[int, ...]
    finish: str
    text: str | None = None


class Writer(Protocol):
    """An engine that is running."""

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        advance: Callable[[int], object] = lambda done: None,
    ) -> list[EngineText]:
        """Write greedy texts, in the order of `prompts`.

        prompts: token ids. ends: the token ids that end a text. advance: called with the number of texts just finished.
        """
        ...


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return the option --engine-args as a dict. Raises UserError if it is not a JSON object."""
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"--engine-args is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"--engine-args must be a JSON object, got {text!r}.")
    refuse_own(found, "--engine-args")
    return found


# What the records state and the modes are made of: set by us alone.
_OWN = (
    *("model", "tokenizer", "seed", "dtype", "max_model_len", "tensor_parallel_size", "generation_config"),
    *("enable_lora", "max_loras", "max_lora_rank", "lora_target_modules", "additional_config", "quantization"),
)


def refuse_own(arguments: Iterable[str], where: str) -> None:
    """Raise UserError for arguments of vLLM that an engine's mode and its record decide. where: the option's name."""
    if own := [name for name in arguments if name in _OWN]:
        raise UserError(f"{where} cannot set {own[0]!r}: the mode and the other options decide it.")


def cut(ids: Sequence[int], ends: Sequence[int]) -> EngineText:
    """Return the text of generated token ids, which ends before the first end token."""
    stop = next((at for at, token in enumerate(ids) if token in ends), None)
    return EngineText(tuple(ids[:stop]), "length" if stop is None else "stop")
