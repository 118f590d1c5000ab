"""The edit as one operator after the MLP block, fused with the operations that follow where possible.

The weights are not changed. The operators are Triton kernels on CUDA and plain ATen on the CPU. `Edit.provider` names
the one that ran, such as "triton/cuda". `Edit.reach` says how much of each layer was fused.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from kernel_surgery import ops
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import REACHES
from kernel_surgery.edit.fused_layer import EditedLayer, reach_of
from kernel_surgery.edit.marks import marked
from kernel_surgery.edit.plan import Edit, SubspaceLike, buffers, hooks, new_edit, parts, plan_edit


@contextmanager
def fused(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float | Tensor = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
    reach: str = "norm",
) -> Iterator[Edit]:
    """Edit the MLP block's output with `ops.project` while the block runs, in every layer of `subspace`.

    strength: a number, or a floating-point tensor [batch] with one value per sequence. The tensor is read at every
    call, including calls of a captured CUDA graph. Write to it in place to switch the edit on and off per request. At
    strength 0 a row is bit-identical to the unedited one. One exception: at reach "norm" on CUDA this holds for the
    residual stream, but the fused norm sums in another order.
    reach: how much of the layer becomes one operator with the edit.
        "output": only the edit.
        "add": the residual addition too.
        "norm" (default): the residual addition and the norm that follows it.
        If a layer does not allow this, less is fused and `Edit.fallbacks` says why. On the CPU all three give the same
        bits.
    model, subspace, layers, force: as in `edit.hook.hooked`.

    Works under torch.compile(fullgraph=True) inside the block. When the block ends, normally or by an exception, the
    model is restored. Yields the record of the edit.

    Numerics: the edit itself is within `numerics.bounds.rule_a_bound`. The fused operators then make the same roundings
    as the separate operations.

    Raises what `edit.plan.plan_edit` raises, and KernelSurgeryError for an unknown reach or a rank that the operators
    do not take (`ops.check_rank`). All of these come before anything is changed.
    """
    if reach not in REACHES:
        raise KernelSurgeryError(f"reach is {reach!r}; expected one of {', '.join(REACHES)}. The model is unchanged.")
    plan = plan_edit(model, subspace, strength, layers, force, per_sequence=True)
    for projection in plan.projections.values():
        ops.check_rank(projection.basis)
    provider = ops.provider(next(iter(plan.projections.values())).basis)
    if provider == "triton/cuda":
        packed = {layer: projection.map(ops.packed) for layer, projection in plan.projections.items()}
        plan = replace(plan, projections=packed)
    reach_and_reason = {layer: reach_of(model, layer, reach) for layer in plan.sites}
    reaches = {layer: how_far for layer, (how_far, _) in reach_and_reason.items()}
    reasons = {layer: why for layer, (_, why) in reach_and_reason.items() if why}
    edit = new_edit("fused", plan, provider, reach=reaches, fallbacks=reasons)
    with ExitStack() as stack:
        stack.enter_context(marked(plan.sites.values(), "fused"))
        tensors = {layer: parts(projection) for layer, projection in plan.projections.items()}
        names = stack.enter_context(buffers(plan, tensors))
        edited = {layer: EditedLayer(model, layer, plan, edit, names) for layer in plan.sites}
        for layer in edited.values():
            stack.enter_context(layer.installed())
        stack.enter_context(hooks(plan, lambda layer: edited[layer].hook))
        yield edit
