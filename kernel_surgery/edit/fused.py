"""The edit as one operator: after `down_proj`, and where it can be, with what follows in the layer. Weights untouched.

On CUDA the operators are Triton kernels, on the CPU plain ATen: `Edit.provider` names the one that ran, `Edit.reach`
how much of each layer it took in.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from kernel_surgery import ops
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.common.names import REACHES
from kernel_surgery.edit.fused_layer import EditedLayer, reach_of
from kernel_surgery.edit.plan import Edit, SubspaceLike, buffers, hooks, new_edit, plan_edit


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
    """Inside the block, the output of `down_proj` is edited by `ops.project` in every layer of `subspace`.

    strength: a number, or a floating tensor [batch] with one strength per sequence. The tensor is read at every call,
    also by a replayed graph: write to it in place to turn the edit on and off per request. Rows of strength 0 pass bit
    for bit (at reach "norm" on CUDA the residual stream does; its norm is another float32 sum).
    layers: only these layers of the subspace. force: accept a subspace of unknown or foreign provenance (never of
    another shape). reach: how much becomes one operator with the edit. "output": nothing more. "add": the residual
    addition too. "norm" (default): and the norm that follows. Where a layer does not allow it, less is fused and
    `Edit.fallbacks` says why. All give the same bits on the CPU.

    Numerics: Rule A of `bounds.rule_a_bound`, then the roundings of the separate operations. Survives
    torch.compile(fullgraph=True) inside the block. Raises what `plan.plan_edit` raises, and KernelSurgeryError for
    another reach, before anything is changed. The model is restored when the block ends, also by an exception.
    """
    if reach not in REACHES:
        raise KernelSurgeryError(f"reach is {reach!r}; expected one of {', '.join(REACHES)}. Nothing was changed.")
    plan = plan_edit(model, subspace, strength, layers, force, per_sequence=True)
    for basis in plan.bases.values():
        ops.check_rank(basis)
    provider = ops.provider(next(iter(plan.bases.values())))
    if provider == "triton/cuda":
        plan = replace(plan, bases={layer: ops.packed(basis) for layer, basis in plan.bases.items()})
    possible = {layer: reach_of(model, layer, reach) for layer in plan.sites}
    reaches = {layer: how_far for layer, (how_far, _) in possible.items()}
    reasons = {layer: why for layer, (_, why) in possible.items() if why}
    edit = new_edit("fused", plan, provider, reach=reaches, fallbacks=reasons)
    with ExitStack() as stack:
        buffer = stack.enter_context(buffers(plan, plan.bases))
        edited = {layer: EditedLayer(model, layer, plan, edit, buffer) for layer in plan.sites}
        for layer in edited.values():
            stack.enter_context(layer.installed())
        stack.enter_context(hooks(plan, lambda layer: edited[layer].hook))
        yield edit
