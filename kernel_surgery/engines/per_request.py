"""One request's own strength in vLLM, and how KV of one strength is kept from requests of another.

A request says `extra_args={"kernel_surgery_strength": 0.5}` in its SamplingParams; over HTTP, `vllm_xargs`. Only model
runner V2, which needs a GPU, can tell the tokens of a step apart. There `StrengthState` writes every request's strength
into the tensor that the operators read, before the step runs, so it also holds in captured graphs. Without V2 such a
request is refused: it would silently be written at the engine's strength.

The keys of vLLM's prefix cache do not hold `extra_args`. So the strength is added to the request's `cache_salt`, which
they do hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import LARGEST_STRENGTH, REQUEST_STRENGTH
from kernel_surgery.engines.settings import read_settings

ASKED = REQUEST_STRENGTH


def strength_in(params: Any) -> float | None:
    """Return the strength that a request asks for, or None. Raises KernelSurgeryError for one that cannot be used."""
    extra = getattr(params, "extra_args", None) or {}
    if ASKED not in extra:
        return None
    value = extra[ASKED]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_STRENGTH:
        raise KernelSurgeryError(f"{ASKED} must be a finite number, got {value!r}. The request was not taken.")
    return float(value)


def check_request(config: Any, params: Any, *, resumable: bool = False) -> float | None:
    """Return the strength that a request asks for, or None.

    config: the engine's `VllmConfig`. resumable: whether more input may follow, for which the key of the first part's
    cache would be used. Raises KernelSurgeryError where a strength would silently not be used: an engine
    without the plugin's configuration, or without model runner V2.
    """
    strength = strength_in(params)
    if strength is None:
        return None
    if read_settings(config.additional_config) is None:
        raise KernelSurgeryError(
            f"a request asks for {ASKED}, but this engine is not edited. The request was not taken. Start the engine "
            'with additional_config={"kernel_surgery": {"subspace": PATH}}.'
        )
    if not config.use_v2_model_runner:
        raise KernelSurgeryError(
            f"a request asks for {ASKED}, which needs vLLM's V2 model runner (on a GPU). The request was not taken. "
            "Set the engine's strength, or serve adapters of several strengths (python -m kernel_surgery.lora)."
        )
    speculative = getattr(config, "speculative_config", None)
    if resumable or getattr(speculative, "enable_adaptive_verification", False):
        why = "a session that is continued" if resumable else "adaptive verification of drafts"
        raise KernelSurgeryError(
            f"a request asks for {ASKED}, which does not work with {why}. The request was not taken. Set the engine's "
            "strength instead."
        )
    return strength


def salted(request: Any, strength: float) -> Any:
    """Return the request with its strength in `cache_salt`. request: an `EngineCoreRequest`."""
    request.cache_salt = f"{request.cache_salt or ''}|{ASKED}={strength!r}"
    return request


class Strengths:
    """The strengths of the requests in a worker, and the tensor [tokens] that the operators read.

    tokens: that tensor, filled with the engine's strength. Rows beyond a step's tokens keep what they held; they are
    padding.
    """

    def __init__(self, tokens: torch.Tensor, requests: int) -> None:
        self.tokens = tokens
        self.own: list[float | None] = [None] * requests
        self.engine = float(tokens[-1])
        self._mixed = False  # whether `tokens` holds other strengths than the engine's

    def add(self, index: int, params: Any) -> None:
        """Note the request in a slot. Slots are used again, so a request without a strength clears its slot."""
        self.own[index] = strength_in(params)

    def fill(self, slots: Any, counts: Any) -> None:
        """Write the strengths of a step. slots: the slot of every request in it. counts: its number of tokens."""
        own = [self.own[int(slot)] for slot in slots]
        if any(strength is not None for strength in own):
            each = torch.tensor([self.engine if strength is None else strength for strength in own])
            # A new tensor in pageable memory: the driver copies it before the call returns, so the next step may not
            # overwrite what this one still reads.
            step = each.repeat_interleave(torch.as_tensor(counts).long())
            self.tokens[: len(step)].copy_(step, non_blocking=True)
            self._mixed = True
        elif self._mixed:
            self.tokens.fill_(self.engine)
            self._mixed = False


class HasStrengths(Protocol):
    """The part of `engines.layers.Edits` that is needed here."""

    strengths: torch.Tensor
    per_request: Strengths | None


def state_class(base: type, edits: HasStrengths) -> type:
    """Return a subclass of a V2 `ModelState` that writes every request's strength before a step."""

    class StrengthState(base):  # a class of vLLM
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.kernel_surgery = Strengths(edits.strengths, self.max_num_reqs)
            edits.per_request = self.kernel_surgery

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.kernel_surgery.add(req_index, new_req_data.sampling_params)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            # Not num_scheduled_tokens, which may be more than a step runs.
            counts = np.diff(input_batch.query_start_loc_np)[: input_batch.num_reqs]
            self.kernel_surgery.fill(input_batch.idx_mapping_np[: input_batch.num_reqs], counts)
            return super().prepare_inputs(input_batch, req_states)

    return StrengthState


@contextmanager
def stated(edits: HasStrengths) -> Iterator[None]:
    """Make model runner V2 keep a strength per request, of the model that is loaded while the block runs."""
    try:
        from vllm.v1.worker.gpu import model_states
    except ImportError:  # a vLLM without V2, or without what it needs
        yield
        return
    resolve = model_states.resolve_model_state_cls
    model_states.resolve_model_state_cls = lambda config, model: state_class(resolve(config, model), edits)
    try:
        yield
    finally:
        model_states.resolve_model_state_cls = resolve
