"""The steps that all four modes share: check the edit, install it, record it.

Everything is checked before anything is changed, and every requested layer is accounted for.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError, MismatchError, ModelError
from kernel_surgery.common.names import LARGEST_STRENGTH
from kernel_surgery.edit.marks import marked, refuse_copy
from kernel_surgery.models.architectures import MlpSite, layout_of, mlp_outputs
from kernel_surgery.models.states import on_states
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.subspace.artifact import Subspace, check_projections

SubspaceLike = Subspace | Mapping[int, BasisLike]
# A forward hook of a site: called with the module, its inputs and its output. None leaves the output as it is.
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]
_names = itertools.count()


@dataclass(frozen=True)
class Edit:
    """The record of one edit that is in force.

    mode: "hook", "fused", "baked" or "lora".
    layers: the edited layers.
    strength: a in y - a A (B^T y - c).
    schedule: {layer: factor of the strength there}, from the subspace; a layer that is not named has 1.
    provider: the code that runs the edit, such as "torch/eager", "aten/cpu" or "triton/cuda"; "weights" for baked.
    note: a warning if the basis was fitted at another site than the one that is edited, or None.
    norms: {layer: (before, after)}, the Frobenius norm of a baked weight.
    calls: {layer: number of forward passes that used the edit}. Calls inside a compiled graph are not counted. Empty
    for baked weights.
    reach: {layer: how much of the layer is fused with the edit}, for the fused mode only (`edit.fused_layer.reach_of`).
    fallbacks: {layer: why less was fused than asked}.
    """

    mode: str
    layers: tuple[int, ...]
    strength: float | Tensor
    provider: str
    note: str | None = None
    norms: dict[int, tuple[float, float]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    reach: dict[int, str] = field(default_factory=dict)
    fallbacks: dict[int, str] = field(default_factory=dict)
    schedule: Mapping[int, float] = field(default_factory=dict)

    def count(self, layer: int) -> None:
        """Count one call of a layer. Does nothing inside a compiled graph."""
        if not torch.compiler.is_compiling():
            self.calls[layer] += 1


@dataclass(frozen=True)
class Plan:
    """An edit that was checked but not made yet.

    sites: {layer: the MLP block's output to edit}. projections: {layer: its edit}, each on its module's device.
    schedule: as in `Edit`.
    """

    sites: Mapping[int, MlpSite]
    projections: dict[int, Projection]
    strength: float | Tensor
    note: str | None
    schedule: Mapping[int, float] = field(default_factory=dict)

    def strength_at(self, layer: int) -> float | Tensor:
        """Return the strength in one layer, as the schedule makes it. A tensor is read anew at every call."""
        factor = self.schedule.get(layer, 1.0)
        return self.strength if factor == 1 else self.strength * factor

    def number_at(self, layer: int) -> float:
        """Return `strength_at` in a mode that takes one number only."""
        strength = self.strength_at(layer)
        assert isinstance(strength, float)  # `check_strength` without `per_sequence`
        return strength


def buffer_name() -> str:
    """Return a buffer name that was not returned before."""
    return f"_kernel_surgery_basis_{next(_names)}"


def check_strength(strength: float | Tensor, per_sequence: bool) -> float | Tensor:
    """Return the strength as a finite number or, with `per_sequence`, as the tensor [batch] that was given.

    Raises TypeError for a tensor without `per_sequence`. Raises KernelSurgeryError for a number that is not finite, and
    for a tensor that has another shape, is not floating-point or requires a gradient.
    """
    if isinstance(strength, Tensor) and strength.ndim > 0:
        if not per_sequence:
            raise TypeError(
                "this mode takes one strength, not a tensor: use fused for one per sequence. The model is unchanged."
            )
        if strength.ndim != 1 or not strength.is_floating_point() or strength.requires_grad:
            raise KernelSurgeryError(
                f"strength is {tuple(strength.shape)} {strength.dtype}, requires_grad={strength.requires_grad}; "
                "expected a number, or a floating-point tensor [batch] without gradient. The model is unchanged."
            )
        return strength
    strength = float(strength)
    if not abs(strength) <= LARGEST_STRENGTH:
        raise KernelSurgeryError(
            f"strength must be a finite number of at most {LARGEST_STRENGTH:.2g}, got {strength}. "
            "The model is unchanged."
        )
    return strength


def plan_edit(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float | Tensor,
    layers: Iterable[int] | None,
    force: bool,
    per_sequence: bool = False,
) -> Plan:
    """Check an edit and return it as a `Plan`. Changes nothing.

    subspace: a `Subspace`, which must belong to the model (`Subspace.check_model`), or a plain mapping of layers to
    bases or `Projection`s, of which only the shapes can be checked.
    strength: a number or, with `per_sequence`, a tensor [batch].
    layers: the layers to edit; None means all layers of the subspace.
    force: accept a subspace of unknown origin, or one fitted on another model.

    Raises KernelSurgeryError for a strength, subspace, layer or model that cannot be used. Its subclass MismatchError
    says that the subspace does not fit the model, ModelError that the architecture is unknown. A model that was copied
    inside a block is refused (`edit.marks`). Raises TypeError for arguments of the wrong type.
    """
    strength = check_strength(strength, per_sequence)
    note, schedule, where = layout_of(model).remark, dict[int, float](), "mlp_out"
    if isinstance(subspace, Subspace):
        subspace.check_model(model, force=force)
        schedule = dict(subspace.strengths)
        edits, origin = subspace.projections, f"fitted on {subspace.model_id or 'an unnamed model'}, {subspace.site}"
        note = subspace.note_on(layout_of(model))
        where = subspace.edited_site
    elif isinstance(subspace, Mapping):
        edits, origin = check_projections(subspace), "a plain mapping"
    else:
        raise TypeError(f"expected a Subspace or a mapping of layers to bases, got {type(subspace).__name__}")
    layer_list = list(edits) if layers is None else list(layers)
    if missing := [layer for layer in layer_list if layer not in edits]:
        raise KernelSurgeryError(
            f"layers {missing} are not in the subspace, which holds {list(edits)}. The model is unchanged."
        )
    sites = mlp_outputs(model, layer_list, where)
    tensors = {
        site.name: (
            *(site.first, *(weight.tensor for weight in site.weights)),
            *(tensor for module in site.opaque for tensor in module.owner.parameters()),
        )
        for site in sites.values()
    }
    if offloaded := [name for name, held in tensors.items() if any(tensor.is_meta for tensor in held)]:
        raise ModelError(
            f"cannot edit {offloaded[0]}: its weight is not in memory ({len(offloaded)} of {len(sites)} layers are "
            "offloaded to the CPU or the disk). The model is unchanged. Load the model without offloading, or bake the "
            "checkpoint."
        )
    for site in sites.values():
        refuse_copy(site)
    for layer, site in sites.items():
        shape, basis = tuple(site.first.shape), edits[layer].basis
        if site.d_model != basis.shape[0]:
            raise MismatchError(
                f"cannot edit {site.name}: basis has d_model={basis.shape[0]}, weight is {shape}.\n"
                f"  subspace: {origin}, layer {layer}, k={basis.shape[1]}\n"
                f"  model:    {getattr(model.config, 'name_or_path', '') or type(model).__name__}\n"
                "No weight was changed. Fit a subspace on this model, or load the one it was fitted on."
            )
    if set(sites) != set(layer_list):
        raise RuntimeError(
            f"layers {sorted(layer_list)} were requested, but {sorted(sites)} were found. The model is unchanged."
        )
    for site in sites.values():
        if isinstance(strength, Tensor) and strength.device.type != site.first.device.type:
            raise KernelSurgeryError(
                f"strength is on {strength.device}, but {site.name} is on {site.first.device}: every call "
                f"would copy it. The model is unchanged. Move it: strength.to({str(site.first.device)!r})."
            )
    placed = {layer: edits[layer].to(s.first.device).map(Tensor.contiguous) for layer, s in sites.items()}
    return Plan(sites, placed, strength, note, {layer: factor for layer, factor in schedule.items() if layer in sites})


def forget_compiled_graphs() -> None:
    """Discard compiled code, so that it is compiled again and sees the hooks of now.

    By default dynamo does not guard on hooks (`skip_nnmodule_hook_guards`). Code compiled before a hook was added or
    removed would silently go on without noticing: the edit would be missing, or would stay.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@contextmanager
def buffers(plan: Plan, values: Mapping[int, Sequence[Tensor | None]]) -> Iterator[tuple[str | None, ...]]:
    """Store the float32 tensors `values[layer]` in every planned module while the block runs.

    Every layer has as many, and None in the same places. Yields their names for `stored`.

    They are buffers, so they follow their module to another device and into captured CUDA graphs. They are kept as
    integers, so `model.to(dtype)` leaves them float32. They are not part of the state dict.
    """
    names = [None if t is None else buffer_name() for t in next(iter(values.values()))]
    try:
        for layer, site in plan.sites.items():
            for name, tensor in zip(names, values[layer], strict=True):
                if name is not None and tensor is not None:
                    site.module.register_buffer(name, tensor.contiguous().view(torch.int32), persistent=False)
        yield tuple(names)
    finally:
        for site in plan.sites.values():
            for name in filter(None, names):
                site.module._buffers.pop(name, None)
                site.module._non_persistent_buffers_set.discard(name)


def stored(module: nn.Module, names: Sequence[str | None]) -> list[Tensor | None]:
    """Return the float32 tensors that `buffers` stored in a module. They are not copied."""
    return [None if name is None else getattr(module, name).view(torch.float32) for name in names]


def parts(edit: Projection) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a projection's tensors, as its constructor takes them."""
    return edit.basis, edit.dual, edit.offset


@contextmanager
def hooks(plan: Plan, hook_of: Callable[[int], Hook]) -> Iterator[None]:
    """Register the forward hook `hook_of(layer)` on every planned module while the block runs."""
    handles = []
    try:
        for layer, site in plan.sites.items():
            handles.append(site.module.register_forward_hook(on_states(hook_of(layer))))
        if len(handles) != len(plan.sites):
            raise RuntimeError(f"{len(handles)} of {len(plan.sites)} layers were hooked")
        forget_compiled_graphs()
        yield
    finally:
        for handle in handles:
            handle.remove()
        forget_compiled_graphs()


@contextmanager
def output_hooks(
    plan: Plan,
    edit: Edit,
    function: Callable[[int, Tensor, Sequence[Tensor | None], tuple[Tensor, ...]], Tensor],
    values: Mapping[int, Sequence[Tensor | None]],
) -> Iterator[None]:
    """Make every planned module return another output while the block runs.

    function: called with the layer, the module's output, the layer's tensors and the module's inputs.
    values: {layer: tensors}, which are stored with `buffers`. `edit.calls` counts the calls.
    """
    with marked(plan.sites.values(), edit.mode), buffers(plan, values) as names:

        def hook_of(layer: int) -> Hook:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                edit.count(layer)
                return function(layer, output, stored(module, names), inputs)

            return hook

        with hooks(plan, hook_of):
            yield


def new_edit(
    mode: str,
    plan: Plan,
    provider: str,
    reach: dict[int, str] | None = None,
    fallbacks: dict[int, str] | None = None,
) -> Edit:
    """Return the record of a planned edit, with its call counts at zero. reach, fallbacks: of the fused mode."""
    layers, calls = tuple(plan.sites), dict.fromkeys(plan.sites, 0)
    return Edit(
        mode, layers, plan.strength, provider, plan.note, {}, calls, reach or {}, fallbacks or {}, plan.schedule
    )
