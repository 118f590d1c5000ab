"""The edit as a forward hook in plain PyTorch: the form to read first, and the one the others are compared with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from kernel_surgery.edit import Edit, SubspaceLike, made_edit, output_hooks, plan_edit
from kernel_surgery.reference import project_eager


@contextmanager
def hooked(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """While the block lasts, `down_proj` of every layer of `subspace` gives y - a U (U^T y) instead of y.

    layers: fewer than the subspace holds. force: accept a subspace of unknown or foreign provenance (never of another
    shape). Float32 arithmetic, one rounding to the activations' dtype. Raises what `edit.plan_edit` raises, before
    anything is changed; the model is as it was when the block ends, by an exception too.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    edit = made_edit("hook", plan, "torch/eager")
    with output_hooks(plan, edit, project_eager):
        yield edit
