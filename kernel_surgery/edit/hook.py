"""The edit as a forward hook in plain PyTorch.

This is the simplest form. Read it first; the other modes are compared with it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from kernel_surgery.edit.plan import Edit, SubspaceLike, new_edit, output_hooks, parts, plan_edit
from kernel_surgery.numerics.projection import Projection
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
    """Hook the MLP blocks so that they give y - a A (B^T y - c) instead of y while the block runs.

    model: a causal LM of a known architecture (`models.architectures.ARCHITECTURES`).
    subspace: a `Subspace`, or a mapping of layers to bases U [d_model, k] (A = B = U, c = 0) or `Projection`s.
    strength: a in the formula. 1 removes the subspace, 2 reflects it. The subspace's schedule multiplies it.
    layers: edit only these layers of the subspace.
    force: accept a subspace of unknown origin, or one fitted on another model. The shape must still match.

    Blocks may be nested: an inner block edits what the outer one made (`edit.marks`).

    Yields the record of the edit. When the block ends, normally or by an exception, the model is restored.

    Numerics: float32 arithmetic (`numerics.precision.computed_in`), then one rounding to the dtype of the activations.

    Raises what `edit.plan.plan_edit` raises, before anything is changed.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    edit, numbers = new_edit("hook", plan, "torch/eager"), {layer: plan.number_at(layer) for layer in plan.sites}

    def edited(layer: int, output: Tensor, tensors: Sequence[Tensor | None], inputs: tuple[Tensor, ...]) -> Tensor:
        return project_eager(output, Projection(*tensors), numbers[layer])  # type: ignore[arg-type]  # from `parts`

    with output_hooks(plan, edit, edited, {layer: parts(projection) for layer, projection in plan.projections.items()}):
        yield edit
