"""The edit as one operator: after `down_proj`, and where it can be, with what follows in the layer. Weights untouched.

On CUDA the operators are Triton kernels, on the CPU plain ATen: `Edit.provider` names the one that ran, `Edit.reach`
how much of each layer it took in.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from kernel_surgery import ops
from kernel_surgery.decoder import REACHES, edited_layers, reach_of
from kernel_surgery.edit import Edit, SubspaceLike, buffer_name, made_edit, output_hooks, plan_edit


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
    """While the block lasts, the output of `down_proj` is edited by `ops.project` in every layer of `subspace`.

    strength: a number, or a floating tensor [batch] of one a sequence, read at every call, also by a replayed graph:
    written to in place, it turns the edit on and off by request. Rows of strength 0 pass bit for bit (at reach "norm"
    on CUDA: the residual stream does, its norm is another float32 sum).
    layers: fewer than the subspace holds. force: accept a subspace of unknown or foreign provenance (never of another
    shape). reach: how much becomes one operator with the edit. "output": nothing more. "add": the residual addition
    too. "norm" (default): and the norm that follows, wherever the layer allows it; where it does not, less, and
    `Edit.fallbacks` says why. All give the same bits on the CPU.

    Numerics: Rule A of `reference.rule_a_bound`, then the roundings of the separate operations. Survives
    torch.compile(fullgraph=True) inside the block. Raises what `edit.plan_edit` raises, and ValueError for another
    reach, before anything is changed; the model is as it was when the block ends, by an exception too.
    """
    if reach not in REACHES:
        raise ValueError(f"reach is {reach!r}; expected one of {', '.join(REACHES)}. Nothing was changed.")
    plan = plan_edit(model, subspace, strength, layers, force, per_sequence=True)
    for basis in plan.bases.values():
        ops.check_rank(basis)
    provider = ops.provider(next(iter(plan.bases.values())))
    if provider == "triton/cuda":
        plan = replace(plan, bases={layer: ops.packed(basis) for layer, basis in plan.bases.items()})
    found = {layer: reach_of(model, layer, reach) for layer in plan.sites}
    reaches = {layer: far for layer, (far, _) in found.items()}
    reasons = {layer: why for layer, (_, why) in found.items() if why}
    edit = made_edit("fused", plan, provider, reach=reaches, fallbacks=reasons)
    buffer, elsewhere = buffer_name(), {}
    with edited_layers(model, plan, edit, buffer, elsewhere), output_hooks(plan, edit, ops.project, buffer, elsewhere):
        yield edit
