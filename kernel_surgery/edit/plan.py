"""What the appliers share: everything is checked before anything is changed, and every layer is accounted for."""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError, MismatchError
from kernel_surgery.models.architectures import Site, mlp_outputs
from kernel_surgery.subspace.artifact import Subspace, check_bases

SubspaceLike = Subspace | Mapping[int, Tensor]
_names = itertools.count()


@dataclass(frozen=True)
class Edit:
    """One applied edit. `calls[layer]` counts the forward passes that went through it (not those inside a compiled
    graph); it is empty for baked weights. `norms[layer]` is the weight's Frobenius norm (before, after) baking.
    `reach[layer]`, of the fused mode alone, is how much of the layer is one operator with the edit, and
    `fallbacks[layer]` why it is less than was asked for (`fused_layer.reach_of`).
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

    def count(self, layer: int) -> None:
        """One more call of a layer; inside a compiled graph nothing is counted."""
        if not torch.compiler.is_compiling():
            self.calls[layer] += 1


@dataclass(frozen=True)
class Plan:
    """A checked edit that has not been made yet."""

    sites: dict[int, Site]
    bases: dict[int, Tensor]
    strength: float | Tensor
    note: str | None


def buffer_name() -> str:
    """A name for a basis among a module's buffers, never given out twice."""
    return f"_kernel_surgery_basis_{next(_names)}"


def check_strength(strength: float | Tensor, per_sequence: bool) -> float | Tensor:
    """The strength, as a finite number or, with `per_sequence`, as the tensor of one a sequence that it is."""
    if isinstance(strength, Tensor) and strength.ndim > 0:
        if not per_sequence:
            raise TypeError(
                "this mode takes one strength for all, not a tensor of strengths: use fused. Nothing was changed."
            )
        if strength.ndim != 1 or not strength.is_floating_point() or strength.requires_grad:
            raise KernelSurgeryError(
                f"strength is {tuple(strength.shape)} {strength.dtype}, requires_grad={strength.requires_grad}; "
                "expected a number, or one a sequence: a floating tensor [batch] without gradient. Nothing was changed."
            )
        return strength
    strength = float(strength)
    if not math.isfinite(strength):
        raise KernelSurgeryError(f"strength must be a finite number, got {strength}. Nothing was changed.")
    return strength


def plan_edit(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float | Tensor,
    layers: Iterable[int] | None,
    force: bool,
    per_sequence: bool = False,
) -> Plan:
    """Check an edit without making it. Raises ValueError or TypeError for anything that does not fit; changes nothing.

    A `Subspace` must belong to the model (`Subspace.check_model`); a plain {layer: basis} mapping is checked for
    shape alone. per_sequence: the strength may be a tensor [batch].
    """
    strength = check_strength(strength, per_sequence)
    note = None
    if isinstance(subspace, Subspace):
        subspace.check_model(model, force=force)
        bases, fitted = subspace.bases, f"fitted on {subspace.model_id or 'an unnamed model'}, {subspace.site}"
        note = subspace.note
    elif isinstance(subspace, Mapping):
        bases, fitted = check_bases(subspace), "a plain mapping"
    else:
        raise TypeError(f"expected a Subspace or a mapping of layers to bases, got {type(subspace).__name__}")
    chosen = list(bases) if layers is None else list(layers)
    if missing := [layer for layer in chosen if layer not in bases]:
        raise KernelSurgeryError(
            f"layers {missing} are not in the subspace, which holds {list(bases)}. Nothing was changed."
        )
    sites = mlp_outputs(model, chosen)
    for layer, site in sites.items():
        shape, basis = tuple(site.module.weight.shape), bases[layer]
        if shape[0] != basis.shape[0]:
            raise MismatchError(
                f"cannot edit {site.name}: basis has d_model={basis.shape[0]}, weight is {shape}.\n"
                f"  subspace: {fitted}, layer {layer}, k={basis.shape[1]}\n"
                f"  model:    {getattr(model.config, 'name_or_path', '') or type(model).__name__}\n"
                "No weight was changed. Fit a subspace on this model, or load the one it was fitted on."
            )
    if set(sites) != set(chosen):
        raise RuntimeError(f"asked for layers {sorted(chosen)}, found sites for {sorted(sites)}. Nothing was changed.")
    for site in sites.values():
        if isinstance(strength, Tensor) and strength.device.type != site.module.weight.device.type:
            raise KernelSurgeryError(
                f"strength is on {strength.device}, {site.name} on {site.module.weight.device}: it would be copied at "
                f"every call. Nothing was changed. Move it: strength.to({str(site.module.weight.device)!r})."
            )
    placed = {layer: bases[layer].to(site.module.weight.device).contiguous() for layer, site in sites.items()}
    return Plan(sites, placed, strength, note)


def forget_compiled_graphs() -> None:
    """Make compiled code look at the hooks again.

    Dynamo does not guard on hooks by default (`skip_nnmodule_hook_guards`): code compiled before a hook came or went
    would go on without noticing, and the edit would silently not be there, or not go away.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@contextmanager
def buffers(plan: Plan, values: Mapping[int, Tensor]) -> Iterator[str]:
    """Inside the block, every planned module has a buffer that holds the layer's value; yields the buffers' name.

    As a buffer a basis follows the model to another device and into captured graphs. It is not part of the state dict.
    """
    name = buffer_name()
    try:
        for layer, site in plan.sites.items():
            site.module.register_buffer(name, values[layer], persistent=False)
        yield name
    finally:
        for site in plan.sites.values():
            site.module._buffers.pop(name, None)
            site.module._non_persistent_buffers_set.discard(name)


@contextmanager
def hooks(plan: Plan, hook_of: Callable[[int], Callable]) -> Iterator[None]:
    """Inside the block, the forward hook `hook_of(layer)` is on every planned module, and on nothing else."""
    handles = []
    try:
        for layer, site in plan.sites.items():
            handles.append(site.module.register_forward_hook(hook_of(layer)))
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
    function: Callable[[Tensor, Tensor, tuple], Tensor],
    values: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Inside the block, every planned module returns `function(output, value, inputs)` instead of its output.

    values: {layer: tensor}, by default the plan's bases; kept in `buffers`. `edit.calls` counts the calls.
    """
    with buffers(plan, plan.bases if values is None else values) as name:

        def hook_of(layer: int) -> Callable:
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                edit.count(layer)
                return function(output, getattr(module, name), inputs)

            return hook

        with hooks(plan, hook_of):
            yield


def new_edit(mode: str, plan: Plan, provider: str, **more) -> Edit:
    """The record of a planned edit that is about to be made and counted."""
    return Edit(mode, tuple(plan.sites), plan.strength, provider, plan.note, calls=dict.fromkeys(plan.sites, 0), **more)
