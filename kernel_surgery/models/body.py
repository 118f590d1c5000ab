"""Run a causal LM only as far as its layers are read: no later layer, and no product with the vocabulary.

The output embedding is a fifth of SmolLM2-135M's forward pass. Its result has batch x tokens x vocabulary numbers.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.architectures import decoder_layers, layout_of, submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def body_up_to(model: "PreTrainedModel", last: int) -> Iterator[nn.Module]:
    """Yield the model's body, which stops after layer `last` while the block runs.

    Call it with the model's own arguments, but for those of the output embedding. The layers that run compute what they
    compute in the whole model, bit for bit: they are the same modules with the same inputs. Edits and hooks on them are
    in force. What the body returns means nothing, for the final norm then follows layer `last`.

    When the block ends, normally or by an exception, the model has its own list of layers again.
    """
    # The list is shortened, and not left by an exception from a hook: accelerate has hooks that run after a module's
    # forward, and an exception would skip them.
    body = cast(nn.Module, submodule(model, layout_of(model).body))
    layers, name = cast(nn.ModuleList, decoder_layers(model)), layout_of(model).layers.rpartition(".")[2]
    if last + 1 < len(layers):
        setattr(body, name, layers[: last + 1])
    try:
        yield body
    finally:
        setattr(body, name, layers)


def positions_of(body: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Return the argument of a body that counts positions from a mask [batch, tokens], so that padding has none.

    It is empty for a body without it: one with ALiBi counts them from the mask by itself.
    """
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def refuse_offloaded(model: "PreTrainedModel") -> None:
    """Raise ModelError if weights are not in memory: accelerate has left them on the disk or in the CPU's memory."""
    if offloaded := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ModelError(
            f"cannot read this model: {offloaded[0]} is not in memory ({len(offloaded)} of "
            f"{len(list(model.parameters()))} weights are offloaded to the CPU or the disk). Nothing was read. Load "
            "the model without offloading, on a larger device or in a smaller dtype."
        )
