"""The edit as a forward hook in plain PyTorch: the form to read first, and the one the others are compared with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from kernel_surgery.edit.plan import Edit, SubspaceLike, new_edit, output_hooks, plan_edit
from kernel_surgery.ops.eager import project_eager


@contextmanager
def hooked(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """Inside the block, `down_proj` of every layer of `subspace` returns y - a U (U^T y) instead of y.

    layers: only these layers of the subspace. force: accept a subspace of unknown or foreign provenance (never of
    another shape). Numerics: float32 arithmetic, one rounding to the activations' dtype. Raises what `plan.plan_edit`
    raises, before anything is changed. The model is restored when the block ends, also by an exception.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    edit = new_edit("hook", plan, "torch/eager")

    def edited(output: Tensor, basis: Tensor, inputs: tuple) -> Tensor:
        return project_eager(output, basis, plan.strength)

    with output_hooks(plan, edit, edited):
        yield edit
