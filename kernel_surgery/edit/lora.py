"""The edit as an exact low-rank adapter in a model in memory: W + B A.

With the edit's basis A_e, dual B_e and strength a, the adapter's A is a B_e^T W and its B is -A_e. For an orthogonal
edit these are a U^T W and -U. The form is LoRA's (Hu et al. 2021, arXiv:2106.09685), but nothing is trained.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.baked import refuse_without_weights
from kernel_surgery.edit.plan import Edit, Plan, SubspaceLike, new_edit, output_hooks, plan_edit
from kernel_surgery.models.architectures import MlpSite, Weight
from kernel_surgery.models.shards import is_split, local, part_of, total
from kernel_surgery.models.table import holder
from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.subspace.written import Written

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes; its default is 16


def padded_rank(k: int) -> int:
    """Return the smallest rank in RANKS that is at least k.

    Raises KernelSurgeryError if k is larger than all of them.
    """
    for rank in RANKS:
        if k <= rank:
            return rank
    raise KernelSurgeryError(f"no engine takes an adapter of rank {k}: at most {RANKS[-1]}. Fit with a smaller --rank.")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of W + B A, in float32: a is A [k, d_ff], b is B [d_model, k]."""

    a: Tensor
    b: Tensor


def lora_pair(weight: Tensor, basis: BasisLike, strength: float = 1.0) -> LoraPair:
    """Return the adapter of an edit without offset, so that (W + B A) h = W h - a A_e (B_e^T W h).

    weight: W [d_model, d_ff], any floating dtype. basis: U [d_model, k], or a `Projection`. strength: a.

    Numerics: float32 arithmetic (`numerics.precision.computed_in`). The error bound of A is
    `numerics.bounds.adapter_bound`.
    """
    wide = computed_in(weight)
    edit = Projection.of(basis).to(weight.device).to(torch.float32)
    with in_full(weight):
        return LoraPair((strength * (edit.reads.T.to(wide) @ weight.detach().to(wide))).float(), -edit.basis)


def refuse_offset(edit: BasisLike) -> None:
    """Refuse an edit with an offset: an adapter adds nothing that does not depend on its input.

    Raises KernelSurgeryError.
    """
    if Projection.of(edit).offset is not None:
        raise KernelSurgeryError(
            "an adapter cannot make an edit with an offset, which adds a constant. Fit with --method oblique, which "
            "has none, or use the mode fused (vLLM: the plugin), or bake if the layer has a bias."
        )


def refuse_bias(name: str, bias: Tensor | None) -> None:
    """Refuse a bias that is not zero.

    An adapter adds B A h, which depends on the input alone, so it cannot edit a bias. Raises KernelSurgeryError.
    """
    if bias is not None and bool((bias != 0).any()):
        raise KernelSurgeryError(
            f"{name} has a bias, which an adapter cannot edit. Use bake or the mode fused (vLLM: the plugin), which "
            "edit biases too."
        )


def add_pair(
    output: Tensor, a: Tensor, b: Tensor, h: Tensor, summed: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return output + B (A h), computed in float32 and rounded once, as PEFT does with a float32 adapter.

    output: [..., d_model]. h: [..., d_ff]. a, b: of a `LoraPair`. The result has output's shape and dtype.
    summed: if h and A are parts of some columns, called with their A h [..., k] to sum it over all parts.
    """
    wide = computed_in(output)
    with in_full(output):
        inside = h.to(wide) @ a.to(wide).T
        inside = inside if summed is None else summed(inside)
        return (output.to(wide) + inside @ b.to(wide).T).to(output.dtype)


@contextmanager
def adapted(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """Make each W that writes into an MLP block's output act as W + B A while the block runs.

    A linear module returns W h + B (A h). Stacked experts get W + B A itself (`_merged`).

    This is the arithmetic of the LoRA adapter that `checkpoint.adapter` writes. The weights are not changed.

    If W is split over processes (`models.shards`), A has the same columns as the part of W, and the k numbers A h of
    every token are summed over the processes.

    model, subspace, strength, layers, force: as in `edit.hook.hooked`. When the block ends, normally or by an
    exception, the model is restored. Yields the record of the edit.

    Numerics: as in `lora_pair` and `add_pair`.

    Raises what `edit.plan.plan_edit` raises, and KernelSurgeryError for an offset and for a bias that is not zero. All
    come before anything is changed.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    refuse_without_weights(plan, "lora")
    written = subspace.tensors if isinstance(subspace, Written) else {}
    pairs, sums, inside = {}, {}, {}
    for layer, site in plan.sites.items():
        refuse_offset(plan.projections[layer])
        if site.stacked:
            raise KernelSurgeryError(
                f"cannot adapt {site.name}: its experts {site.stacked[0]} are quantised in memory, and no adapter of "
                "them can be made here. No weight was changed. Use mode fused or hook."
            )
        for weight in site.weights:
            if not weight.matrix:
                refuse_bias(holder(weight.name), local(weight.tensor))
        if (linear := _linear(site)) is not None:
            name, _ = linear.parts()[0]
            pairs[layer] = _pair(name.removesuffix(".weight"), linear, plan, layer, written)
            sums[layer] = partial(total, like=linear.tensor) if is_split(linear.tensor) else None
            inside[layer] = replace(site, module=linear.owner)
        elif site.opaque:
            module = site.opaque[0]
            edits = plan.projections[layer], plan.number_at(layer)
            pair = _written(module.name.removesuffix(".weight"), lora_pair(module.matrix(site.first), *edits), written)
            pairs[layer], sums[layer], inside[layer] = pair, None, replace(site, module=module.owner)
    edit, hooked = new_edit("lora", plan, "torch/eager"), replace(plan, sites=inside)
    for layer in plan.sites.keys() - inside.keys():
        del edit.calls[layer]  # the edit is in the weights

    def edited(layer: int, output: Tensor, pair: Sequence[Tensor | None], inputs: tuple[Tensor, ...]) -> Tensor:
        a, b = pair
        assert a is not None and b is not None  # as `pairs` has them
        return add_pair(output, a, b, inputs[0], sums[layer])

    with ExitStack() as stack:
        if experts := [layer for layer, site in plan.sites.items() if any(w.form.stacked for w in site.weights)]:
            stack.enter_context(_merged(plan, experts, written))
        if inside:
            stack.enter_context(output_hooks(hooked, edit, edited, pairs))
        yield edit


def _linear(site: MlpSite) -> Weight | None:
    """Return the linear module's weight that writes into an output: a layer has one at most, dense or shared."""
    return next((weight for weight in site.weights if weight.matrix and not weight.form.stacked), None)


def _pair(
    module: str, weight: Weight, plan: Plan, layer: int, written: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return A and B of one linear module, of which A has the columns of this process's part of W."""
    pair = lora_pair(weight.parts()[0][1], plan.projections[layer], plan.number_at(layer))
    a, b = _written(module, pair, written)
    return (a if a is pair.a else part_of(a, weight.tensor)), b


def _written(module: str, pair: LoraPair, written: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A and B of a module: those that an adapter holds, if there is one."""
    a, b = (written.get(f"{module}.{part}") for part in ("lora_A", "lora_B"))
    return (pair.a if a is None else a.to(pair.a)), (pair.b if b is None else b.to(pair.b))


@contextmanager
def _merged(plan: Plan, layers: Iterable[int], written: Mapping[str, Tensor]) -> Iterator[None]:
    """Add B A to stacked experts while the block runs, as PEFT does with a parameter that is not a module's weight.

    PEFT forms W + B A at every call; here it is formed once. Numerics: float32, with one rounding to W's dtype.
    """
    stacked = [(layer, w) for layer in layers for w in plan.sites[layer].weights if w.matrix and w.form.stacked]
    originals = [(weight.tensor, local(weight.tensor).detach().clone()) for _, weight in stacked]
    try:
        with torch.no_grad():
            for layer, weight in stacked:
                for name, now in weight.parts():
                    pair = lora_pair(now, plan.projections[layer], plan.number_at(layer))
                    a, b = (written.get(f"{name}.{part}") for part in ("lora_A", "lora_B"))
                    a, b = pair.a if a is None else a.to(pair.a), pair.b if b is None else b.to(pair.b)
                    wide = computed_in(now)
                    with in_full(now):
                        now.copy_((now.to(wide) + b.to(wide) @ a.to(wide)).to(now.dtype))
        yield
    finally:
        with torch.no_grad():
            for tensor, original in originals:
                local(tensor).copy_(original)
