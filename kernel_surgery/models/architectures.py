"""The modules of a model that are read and edited: its decoder layers, and what writes the MLP block's output.

The table of architectures (`models.table`) says where they are. Everything that is not in it is refused by name: an
edit in nearly the right place is worse than none.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.common.names import WRITE
from kernel_surgery.models.opaque import Opaque, opaque
from kernel_surgery.models.shards import local, refuse_unknown_split
from kernel_surgery.models.table import ARCHITECTURES, REFUSED, Form, Layout
from kernel_surgery.numerics.precision import STORED

FLOATS = frozenset(stored.dtype for stored in STORED.values())  # 8-bit floats mean nothing without their scales


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


@dataclass(frozen=True)
class Weight:
    """A tensor in memory that writes into an MLP block's output. owner: the module that has it."""

    name: str
    tensor: Tensor
    form: Form
    owner: nn.Module

    @property
    def matrix(self) -> bool:
        return not self.form.bias

    def parts(self, tensor: Tensor | None = None) -> list[tuple[str, Tensor]]:
        """Return (name, view) of each matrix as [d_model, columns], and of each bias as [d_model].

        tensor: another tensor of the same shape; by default this process's part of this one.
        """
        held = local(self.tensor if tensor is None else tensor)
        found = [(f"{self.name}[{i}]", t) for i, t in enumerate(held)] if self.form.stacked else [(self.name, held)]
        return [(name, t.T if self.form.transposed else t) for name, t in found]

    def sampled(self) -> tuple[str, Tensor]:
        """Return the name and the matrix [d_model, columns] that a fingerprint samples: of stacked experts the first's.

        A matrix that is split over processes (`models.shards`) is returned as it is held.
        """
        held = self.tensor[0] if self.form.stacked else self.tensor
        return f"{self.name}[0]" if self.form.stacked else self.name, held.T if self.form.transposed else held


@dataclass(frozen=True)
class MlpSite(Site[nn.Module]):
    """The output of one MLP block, or of the norm after it.

    weights: what writes into it, the matrices first; none of a norm's output. first: a tensor with the dtype and the
    device of what is there. d_model: the numbers of one token's output. opaque: quantised modules that write into it,
    whose weights are not floats. stacked: the names of quantised experts that are one tensor.
    """

    weights: tuple[Weight, ...]
    first: Tensor
    d_model: int
    opaque: tuple[Opaque, ...] = ()
    stacked: tuple[str, ...] = ()

    @property
    def quantised(self) -> str | None:
        """The name of a quantised matrix that writes into the output, or None."""
        return next(iter((*self.stacked, *(module.name for module in self.opaque))), None)

    @property
    def constant(self) -> bool:
        """Whether a bias is added to every token's output as it is. Those of experts are scaled or left out."""
        return any(weight.form.bias and weight.form.role == "dense" for weight in self.weights)


def model_type(model: nn.Module) -> str:
    """Return the model type that the configuration names, such as "qwen2", or else the name of the class."""
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a loaded causal LM. Raises ModelError for an architecture that is not in the table."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return layout_named(model_type(model), getattr(text, "model_type", None))


def layout_named(kind: str, inner: str | None = None) -> Layout:
    """Return the layout of a model type. Raises ModelError for one that is not in the table.

    inner: the type of the language model inside one of several modalities, if that is known.
    """
    if kind in REFUSED:
        raise ModelError(f"{kind!r} models are not supported: {REFUSED[kind]}. Nothing was changed.")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"cannot find the MLP outputs of a {kind!r} model: it is none of the {len(ARCHITECTURES)} known model "
            "types.\npython -m kernel_surgery.collect --list-models prints them. To add one, write a row in "
            "kernel_surgery/models/table.py (docs/models.md says how)."
        )
    layout = ARCHITECTURES[kind]
    if layout.inner and inner not in (None, kind, *layout.inner):
        raise ModelError(
            f"a {kind!r} model with a {inner!r} model inside is not known: only {', '.join(layout.inner)}. Nothing was "
            "changed."
        )
    return layout


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
    """Return the norm that reads a layer's output: the first of the next layer, or the model's last.

    Raises ModelError for an architecture without such a norm.
    """
    path = layout_of(model).next_norm(layer, len(decoder_layers(model)))
    if path is None:
        raise ModelError(f"no norm reads the output of a {model_type(model)!r} layer.")
    return cast(Norm, submodule(model, path))


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


def mlp_outputs(model: nn.Module, layers: Iterable[int] | None = None, site: str = "mlp_out") -> dict[int, MlpSite]:
    """Return {layer: site} of the MLP blocks' outputs in the given layers (default: all).

    site: "mlp_out", or "mlp_write" for what the norm after the block gives. No weight makes that, so those have none.

    Raises ModelError for "mlp_write" in a model without such a norm, for an unknown architecture, layers out of range,
    and weights that are missing, or split over processes in an unknown way (`models.shards`). Quantised ones are apart
    (`MlpSite.opaque`).
    """
    blocks, layout = decoder_layers(model), layout_of(model)
    chosen = check_layers(range(len(blocks)) if layers is None else layers, len(blocks))
    config: Any = getattr(model, "config", None)
    if layout.bypassed and getattr(config, layout.bypassed, False):
        raise ModelError(
            f"with {layout.bypassed} = true, a {model_type(model)!r} model computes the MLP block's output without "
            f"calling {layout.site_name('*')}: the edit would not be made. The model is unchanged. Set "
            f"{layout.bypassed} to false in config.json."
        )
    if site == WRITE:
        return _written(model, blocks, layout, chosen)
    plan, sites = getattr(model, "tp_plan", None) or {}, {}
    for layer in chosen:
        name, module = layout.site_name(layer), submodule(blocks[layer], layout.site)
        if module is None:
            raise ModelError(f"{name} does not exist in this {model_type(model)!r} model.")
        sites[layer] = _site(model, layout, layer, module)
        for weight in sites[layer].weights:
            if weight.matrix:
                module_name = weight.name.removesuffix(".weight")
                refuse_unknown_split(module_name, weight.owner, weight.tensor, plan.get(layout.site_name("*")))
    return sites


def _site(model: nn.Module, layout: Layout, layer: int, module: nn.Module) -> MlpSite:
    """Return the output of one MLP block. Raises ModelError if nothing is known to write into it."""
    block = decoder_layers(model)[layer]
    name, weights = layout.site_name(layer), tuple(_weights(block, layout, layer))
    matrices = [weight for weight in weights if weight.matrix]
    modules, stacked = list[Opaque](), list[str]()
    for form in layout.writes:
        path, _, last = form.path.rpartition(".")
        full, owner = f"{layout.layer(layer)}.{form.path}", submodule(block, path)
        held = getattr(owner, last, None)
        if isinstance(held, Tensor) and held.dtype in FLOATS:
            continue
        if form.stacked and not form.bias and isinstance(held, Tensor):
            stacked.append(full)
        elif (found := opaque(full, owner, form)) is not None:
            modules.append(found)
    if not (matrices or modules or stacked):
        raise ModelError(f"{name} is a {type(module).__name__}, without a weight that writes into its output.")
    if matrices:
        first, d_model = matrices[0].tensor, matrices[0].parts()[0][1].shape[0]
    else:
        near = next((tensor for tensor in block.parameters() if tensor.dtype in FLOATS), None)
        if near is None:
            raise ModelError(f"{name} is quantised, and no tensor of its layer tells the dtype of its output.")
        first = near
        d_model = modules[0].rows if modules else int(cast(Any, model.config).get_text_config().hidden_size)
    return MlpSite(layer, name, module, weights, first, d_model, tuple(modules), tuple(stacked))


def _written(
    model: nn.Module, blocks: Sequence[nn.Module], layout: Layout, layers: Iterable[int]
) -> dict[int, MlpSite]:
    """Return {layer: site} of the norms that follow the MLP blocks' outputs."""
    if layout.after is None:
        raise ModelError(
            f"in a {model_type(model)!r} model no norm follows the MLP block's output: site {WRITE} is for models such "
            f"as {', '.join(kind for kind, row in ARCHITECTURES.items() if row.after)}. Use site mlp_out."
        )
    sites = {}
    for layer in layers:
        name, module = f"{layout.layer(layer)}.{layout.after}", submodule(blocks[layer], layout.after)
        if module is None:
            raise ModelError(f"{name} does not exist in this {model_type(model)!r} model.")
        before = _site(model, layout, layer, module)
        sites[layer] = MlpSite(layer, name, module, (), before.first, before.d_model)
    return sites


def _weights(block: nn.Module, layout: Layout, layer: int) -> Iterator[Weight]:
    """Yield the tensors of floats in one decoder layer that write into its MLP block's output."""
    for form in layout.writes:
        path, _, last = form.path.rpartition(".")
        owner = submodule(block, path)
        tensor = getattr(owner, last, None)
        if owner is not None and isinstance(tensor, Tensor) and tensor.dtype in FLOATS:
            yield Weight(f"{layout.layer(layer)}.{form.path}", tensor, form, owner)


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


def spans(layers: Sequence[int]) -> str:
    """Return sorted layers as `parse_layers` reads them, such as "8-10,13"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
