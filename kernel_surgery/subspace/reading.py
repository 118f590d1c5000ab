"""Run prompts through a model and hand over each layer's activations, batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import SITES
from kernel_surgery.models.architectures import Site, mlp_outputs, residual_outputs
from kernel_surgery.models.body import body_up_to, positions_of, refuse_offloaded
from kernel_surgery.models.padding import padded, padding_id
from kernel_surgery.models.states import on_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoded = Sequence[Sequence[int]]
Take = Callable[[int, Tensor, Tensor], object]


def sites_at(model: "PreTrainedModel", layers: Sequence[int], site: str) -> Mapping[int, Site[nn.Module]]:
    """Return {layer: `Site`} of the modules whose output is read. Raises SubspaceError for an unknown site."""
    if site not in SITES:
        raise SubspaceError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    return residual_outputs(model, layers) if site == "resid_post" else mlp_outputs(model, layers, site)


@contextmanager
def reading(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    layers: Sequence[int],
    site: str,
    take: Take,
    more: Mapping[str, Take] = MappingProxyType({}),
) -> Iterator[Callable[[Encoded], None]]:
    """Yield a function that runs one batch of prompts, given as token ids, through the layers up to the last one asked.

    take: called with (layer, states, mask) for every layer that is read. states [batch, tokens, d_model] are in the
    model's dtype on the layer's device. mask [batch, tokens] is there too; it is 0 for padding, which is on the
    tokenizer's side. Edits of the model that are in force are in the states. more: {another site: what takes it, in the
    same pass}.

    Positions are counted from the mask, so padding on either side does not change the rotary positions.

    Raises SubspaceError for an unknown site, ModelError for an unknown architecture or layer and for weights that are
    not in memory. The function raises RuntimeError if a layer did not run.
    """
    takes = {site: take, **more}
    sites, pad = {name: sites_at(model, layers, name) for name in takes}, padding_id(model, tokenizer)
    refuse_offloaded(model)
    mask = torch.empty(0)  # of the batch that runs
    seen: set[tuple[str, int]] = set()

    def catch(name: str, layer: int) -> Callable[..., object]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], states: Tensor) -> None:
            takes[name](layer, states, mask.to(states.device))
            seen.add((name, layer))

        return on_states(hook)

    asked = [(name, layer, found) for name, by_layer in sites.items() for layer, found in by_layer.items()]
    handles = [found.module.register_forward_hook(catch(name, layer)) for name, layer, found in asked]
    try:
        with body_up_to(model, max(layer for _, layer, _ in asked)) as body:

            def read(batch: Encoded) -> None:
                nonlocal mask
                ids, mask = padded(batch, pad, tokenizer.padding_side, model.device)
                seen.clear()
                with torch.no_grad():
                    body(input_ids=ids, attention_mask=mask, use_cache=False, **positions_of(body, mask))
                if silent := sorted({layer for name, layer, _ in asked if (name, layer) not in seen}):
                    raise RuntimeError(f"layers {silent} did not run: nothing was read there, nothing was written")

            yield read
    finally:
        for handle in handles:
            handle.remove()
