"""The modules of a model that are read and edited: its decoder layers, and the last projection of each MLP.

One piece of code for every Llama-shaped architecture: `model.model.layers[i].mlp.down_proj`, an `nn.Linear` whose
output is added to the residual stream as it is. Architectures that differ there (a norm after the MLP, experts, fused
weights) are not in the list and are refused by name: an edit in nearly the right place is worse than none.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.shards import refuse_unknown_split


@dataclass(frozen=True)
class Layout:
    """The paths of a causal LM's parts. A path names a module and is the prefix of its tensors' names on disk."""

    layers: str = "model.layers"
    projection: str = "mlp.down_proj"  # the module in a layer whose output is the MLP's
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    norm: str = "model.norm"  # after the last layer
    input_norm: str = "input_layernorm"  # the first thing in a layer

    @property
    def body(self) -> str:
        """The path of the module that runs the layers: the causal LM without its output embedding."""
        return self.layers.rpartition(".")[0]

    def layer(self, index: int) -> str:
        """Return the path of a decoder layer."""
        return f"{self.layers}.{index}"

    def site(self, index: int | str) -> str:
        """Return the path of the module whose output is edited. "*" stands for any layer."""
        return f"{self.layers}.{index}.{self.projection}"

    def next_norm(self, index: int, n_layers: int) -> str:
        """Return the path of the norm that reads a layer's output."""
        return f"{self.layer(index + 1)}.{self.input_norm}" if index + 1 < n_layers else self.norm

    def edited_layer(self, tensor: str, layers: Container[int]) -> int | None:
        """Return the layer of a weight or bias that an edit of `layers` changes, else None."""
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.{re.escape(self.projection)}\.(?:weight|bias)", tensor)
        return int(match[1]) if match and int(match[1]) in layers else None


LLAMA = Layout()
# {model_type in config.json: layout}, one entry per supported architecture.
ARCHITECTURES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA)


class Norm(nn.Module):
    """A type for RMSNorms of transformers, to say what they have. Nothing is an instance of it."""

    weight: Tensor
    variance_epsilon: float


class DecoderLayer(nn.Module):
    """A type for decoder layers of transformers, to say what they have. Nothing is an instance of it."""

    input_layernorm: Norm
    self_attn: nn.Module
    post_attention_layernorm: Norm
    mlp: nn.Module


M_co = TypeVar("M_co", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class Site(Generic[M_co]):
    """One place in one layer. `name` is the module's path in the model."""

    layer: int
    name: str
    module: M_co


def model_type(model: nn.Module) -> str:
    """Return the model type that the configuration names, such as "qwen2", or else the name of the class."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a loaded causal LM. Raises ModelError for an architecture that is not in the table."""
    return layout_named(model_type(model))


def layout_named(kind: str) -> Layout:
    """Return the layout of a model type. Raises ModelError for one that is not in the table."""
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"cannot find the MLP outputs of a {kind!r} model: known architectures are {', '.join(ARCHITECTURES)}.\n"
            "To support it, add its layout to kernel_surgery/models/architectures.py."
        )
    return ARCHITECTURES[kind]


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a dotted path, or None."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def decoder_layers(model: nn.Module) -> Sequence[DecoderLayer]:
    """Return the decoder layers of a causal LM. Raises ModelError if the architecture is unknown or has none."""
    layout = layout_of(model)
    layers = cast(Sequence[DecoderLayer] | None, submodule(model, layout.layers))
    if layers is None or len(layers) == 0:
        kind = model_type(model)
        raise ModelError(f"this {kind!r} model ({type(model).__name__}) has no decoder layers at {layout.layers}.")
    return layers


def next_norm(model: nn.Module, layer: int) -> Norm:
    """Return the norm that reads a layer's output: the first of the next layer, or the model's last."""
    return cast(Norm, submodule(model, layout_of(model).next_norm(layer, len(decoder_layers(model)))))


def check_layers(layers: Iterable[int], n_layers: int) -> list[int]:
    """Return the layers, sorted. Raises ModelError for none, duplicates, and any outside 0 .. n_layers - 1."""
    chosen = list(layers)
    if not chosen:
        raise ModelError("no layers were given.")
    if outside := [layer for layer in chosen if not 0 <= layer < n_layers]:
        raise ModelError(
            f"layer {outside[0]} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}.\n"
            "Choose layers within that range."
        )
    if len(set(chosen)) != len(chosen):
        raise ModelError(f"a layer is given twice: {chosen}. Give each layer once.")
    return sorted(chosen)


def mlp_outputs(model: nn.Module, layers: Iterable[int] | None = None) -> dict[int, Site[nn.Linear]]:
    """Return {layer: Site} of `down_proj` in the given layers (default: all).

    Raises ModelError for an unknown architecture, layers out of range, and a `down_proj` that is missing or not an
    `nn.Linear` (quantised weights have no rows to project), or is split over processes in an unknown way
    (`models.shards`).
    """
    blocks, layout = decoder_layers(model), layout_of(model)
    plan, sites = getattr(model, "tp_plan", None) or {}, {}
    for layer in check_layers(range(len(blocks)) if layers is None else layers, len(blocks)):
        name, module = layout.site(layer), submodule(blocks[layer], layout.projection)
        if module is None:
            raise ModelError(f"{name} does not exist in this {model_type(model)!r} model.")
        if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
            raise ModelError(
                f"{name} is a {type(module).__name__}, not a floating-point nn.Linear.\n"
                "Load the model without quantisation."
            )
        refuse_unknown_split(name, module, plan.get(layout.site("*")))
        sites[layer] = Site(layer, name, module)
    return sites


def residual_outputs(model: nn.Module, layers: Iterable[int] | None = None) -> dict[int, Site[DecoderLayer]]:
    """Return {layer: Site} of whole decoder layers, whose output is the residual stream after the layer."""
    blocks, layout = decoder_layers(model), layout_of(model)
    chosen = check_layers(range(len(blocks)) if layers is None else layers, len(blocks))
    return {layer: Site(layer, layout.layer(layer), blocks[layer]) for layer in chosen}


def default_layers(n_layers: int) -> range:
    """Return the middle half: ceil(n/4) .. floor(3n/4) - 1, such as 9 .. 26 of 36. Raises ModelError if it is empty."""
    chosen = range(-(-n_layers // 4), 3 * n_layers // 4)
    if not chosen:
        raise ModelError(f"a model of {n_layers} layers has no middle half. Choose the layers with --layers.")
    return chosen


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Read `9-26` or `2,3,5-7` as a sorted list. Raises ModelError for other texts and for layers out of range."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ModelError(f'cannot read layers {text!r}: give numbers and ranges such as "9-26" or "2,3,5-7".')
        chosen += range(int(match[1]), int(match[2] or match[1]) + 1)
    return check_layers(chosen, n_layers)
