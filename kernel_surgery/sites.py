"""Where a model is read and edited: its decoder layers, and the projection that ends each layer's MLP.

One piece of code for every Llama-shaped architecture: `model.model.layers[i].mlp.down_proj`, an `nn.Linear` whose
output is added to the residual stream as it is. Architectures that differ there (a norm after the MLP, experts, fused
weights) are not in the list and are refused by name: an edit in nearly the right place is worse than none.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Site:
    """One place in one layer. `name` is the module's path in the model."""

    layer: int
    name: str
    module: "nn.Module"


def decoder_layers(model) -> "nn.ModuleList":
    """The decoder layers of a causal LM. Raises ValueError for an architecture that is not known to be Llama-shaped."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"cannot find the MLP outputs of a {kind!r} model ({type(model).__name__}): known architectures are "
            f"{', '.join(ARCHITECTURES)}.\nThe model was left unchanged. Its layers would have to be added to sites.py."
        )
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or len(layers) == 0:
        raise ValueError(f"this {kind!r} model ({type(model).__name__}) has no model.layers. It was left unchanged.")
    return layers


def check_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    """The layers, sorted. Raises ValueError for none, for duplicates, and for one outside 0 .. n_layers - 1."""
    chosen = list(layers)
    if not chosen:
        raise ValueError("no layers were asked for. Nothing was changed.")
    if outside := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise ValueError(
            f"layer {outside[0]} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}.\n"
            "Nothing was changed. Choose layers within that range."
        )
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers are asked for twice: {chosen}. Nothing was changed.")
    return sorted(chosen)


def mlp_outputs(model, layers: Iterable[int] | None = None) -> dict[int, Site]:
    """{layer: Site} of `down_proj` in the given layers (default: all).

    Raises ValueError for an unknown architecture, layers out of range, and a `down_proj` that is missing or not an
    `nn.Linear` (quantised weights have no rows to project).
    """
    from torch import nn

    blocks = decoder_layers(model)
    found = {}
    for layer in check_layers(range(len(blocks)) if layers is None else layers, len(blocks)):
        name = f"model.layers.{layer}.mlp.down_proj"
        module = getattr(getattr(blocks[layer], "mlp", None), "down_proj", None)
        if module is None:
            raise ValueError(f"{name} does not exist in this {model.config.model_type!r} model. Nothing was changed.")
        if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
            raise ValueError(
                f"{name} is a {type(module).__name__}, not a floating-point nn.Linear. Nothing was changed.\n"
                "Load the model without quantisation."
            )
        found[layer] = Site(layer, name, module)
    return found


def residual_outputs(model, layers: Iterable[int] | None = None) -> dict[int, Site]:
    """{layer: Site} of whole decoder layers: their output is the residual stream after the layer."""
    blocks = decoder_layers(model)
    chosen = check_layers(range(len(blocks)) if layers is None else layers, len(blocks))
    return {layer: Site(layer, f"model.layers.{layer}", blocks[layer]) for layer in chosen}


def default_layers(n_layers: int) -> range:
    """The middle half: ceil(n/4) .. floor(3n/4) - 1, such as 9 .. 26 of 36. Raises ValueError below 2 layers."""
    chosen = range(-(-n_layers // 4), 3 * n_layers // 4)
    if not chosen:
        raise ValueError(f"a model of {n_layers} layers has no middle half. Name the layers.")
    return chosen


def parse_layers(text: str, n_layers: int) -> list[int]:
    """`9-26` or `2,3,5-7` as a sorted list. Raises ValueError for anything else and for layers out of range."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f'cannot read layers {text!r}: give numbers and ranges such as "9-26" or "2,3,5-7".')
        chosen += range(int(match[1]), int(match[2] or match[1]) + 1)
    return check_layers(chosen, n_layers)
