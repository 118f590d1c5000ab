"""The edit as one operator after `down_proj`: weights untouched, on and off at will.

On CUDA the operator is a Triton kernel, on the CPU plain ATen: `Edit.provider` names the one that ran. (A hook cannot
fuse with the residual addition that follows; doing so needs the decoder layer itself.)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from kernel_surgery import ops
from kernel_surgery.edit import Edit, SubspaceLike, output_hooks, plan_edit


@contextmanager
def fused(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """While the block lasts, the output of `down_proj` passes through `ops.project` in every layer of `subspace`.

    layers: fewer than the subspace holds. force: accept a subspace of unknown or foreign provenance (never of another
    shape). Numerics: Rule A of `reference.rule_a_bound`. Survives torch.compile(fullgraph=True) inside the block.
    Raises what `edit.plan_edit` raises, before anything is changed; the model is as it was when the block ends, by an
    exception too.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    for basis in plan.bases.values():
        ops.check_rank(basis)
    provider = ops.provider(next(iter(plan.bases.values())))
    with output_hooks("fused", plan, provider, ops.project) as edit:
        yield edit
