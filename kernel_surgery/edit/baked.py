"""The edit in the weights of a model in memory: W <- W - a A (B^T W), and a bias b <- b - a A (B^T b - c).

For an orthogonal edit, where A = B = U, this is weight orthogonalization. Baking a checkpoint on disk uses the same
arithmetic: see `checkpoint.baking`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.marks import Mark, marked, put_back
from kernel_surgery.edit.plan import Edit, Plan, SubspaceLike, plan_edit
from kernel_surgery.models.architectures import MlpSite, Weight
from kernel_surgery.models.shards import is_split, local, part_of, total
from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.projection import BasisLike, Projection
from kernel_surgery.subspace.written import Written

ROWS_AT_ONCE = 256
AFTER_A_NORM = (
    "the edit is at site mlp_write, after a norm, and no weight makes what a norm gives. Use --mode hook or fused, or "
    "fit at site mlp_out."
)


def remove(weight: Tensor, basis: BasisLike, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return W - a A (B^T W) in W's dtype, and B^T W in float32. For a bias, c is subtracted from B^T b in both.

    weight: W [d_model, d_ff], or a bias [d_model].
    basis: U [d_model, k], or a `Projection`.
    strength: a.

    The first tensor is new and has W's shape. The second is [k, columns], where a bias counts as one column.

    Numerics: float32 arithmetic (float64 for a float64 weight, whose U^T W is float64 too), with one rounding at the
    end. The error bound is `numerics.bounds.baked_element_bound`. P = I - A B^T is never formed, because rounding P to
    bfloat16 would leave a fifth of the elements wrong.
    """
    wide = computed_in(weight)
    w = weight.detach().reshape(weight.shape[0], -1)
    edit = Projection.of(basis).to(weight.device).to(wide).for_tensor(weight.ndim)
    # On a CPU, take a few rows at a time. A float32 copy of a whole large weight needs fresh memory pages each time,
    # which took two thirds of the time. Small copies stay in the cache. The sums over rows are float32 either way.
    step = ROWS_AT_ONCE if w.device.type == "cpu" else max(1, w.shape[0])
    row_slices = [slice(start, start + step) for start in range(0, w.shape[0], step)]
    inside = torch.zeros(edit.basis.shape[1], w.shape[1], dtype=wide, device=w.device)
    edited = torch.empty_like(w, memory_format=torch.contiguous_format)
    with in_full(weight):
        for rows in row_slices:
            inside.addmm_(edit.reads[rows].T, w[rows].to(wide))
        if edit.offset is not None:
            inside -= edit.offset[:, None]
        for rows in row_slices:
            edited[rows] = torch.addmm(w[rows].to(wide), edit.basis[rows], inside, alpha=-strength)
    return edited.reshape(weight.shape), inside.to(torch.promote_types(weight.dtype, torch.float32))


def bake_weight(weight: Tensor, basis: BasisLike, strength: float = 1.0) -> Tensor:
    """Return W - a A (B^T W) as a new tensor of W's dtype.

    Shapes and numerics are those of `remove`; this is the first tensor that it returns.
    """
    return remove(weight, basis, strength)[0]


def refuse_offset_without_bias(name: str, edit: BasisLike, has_bias: bool) -> None:
    """Refuse an offset where no bias could take it. name: of the module. Raises KernelSurgeryError."""
    if Projection.of(edit).offset is not None and not has_bias:
        raise KernelSurgeryError(
            f"cannot bake {name}: the edit has an offset, and the module has no bias that could hold it. No weight was "
            "changed. Fit with --method oblique, which has no offset, or use the mode fused (vLLM: the plugin)."
        )


@contextmanager
def baked(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """Replace each W that writes into an MLP block's output by W - a A (B^T W) while the block runs.

    A bias b becomes b - a A (B^T b - c). Of a mixture of experts every expert is edited, routed and shared.

    model, subspace, strength, layers, force: as in `edit.hook.hooked`.

    The parameters stay the same objects, so optimizers and compiled code see the edit. A copy of each original is kept
    on the same device. When the block ends, normally or by an exception, the originals are put back and are
    bit-identical. A block that was opened inside must have ended by then. Yields the record of the edit, with the
    weight norms before and after.

    Numerics: as in `remove`. Of a `Written` edit the weights are those of its checkpoint, in the model's dtype.

    Of a weight that is split over processes (`models.shards`), each process edits its columns. A column of W - a A
    (B^T W) depends on the same column of W alone, so this is the same arithmetic as in one process.

    Raises what `edit.plan.plan_edit` raises, and KernelSurgeryError for quantised weights, if two layers share one
    weight, for an offset without a bias, and for a block of another mode around this one (`edit.marks`). All come
    before anything is changed.
    At its end, raises KernelSurgeryError if a block inside it is still open.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    refuse_without_weights(plan, "baked")
    _refuse_quantised(plan)
    written = subspace.tensors if isinstance(subspace, Written) else {}
    owners: dict[int, str] = {}
    for layer, site in plan.sites.items():
        refuse_offset_without_bias(site.name, plan.projections[layer], site.constant)
        for weight in site.weights:
            pointer = local(weight.tensor).data_ptr()
            if weight.matrix and pointer in owners and pointer != 0:
                raise KernelSurgeryError(
                    f"cannot bake {site.name}: it shares its weight with {owners[pointer]}, and one tensor cannot hold "
                    "two edits.\n"
                    "No weight was changed. Use the fused mode, which leaves weights alone."
                )
            owners[pointer] = site.name
    norms: dict[int, tuple[float, float]] = {}
    with marked(plan.sites.values(), "baked") as marks, _restored(plan, marks):
        with torch.no_grad():
            for layer, site in plan.sites.items():
                before = _norm(site)
                for weight in site.weights:
                    marks[layer].originals.append((weight.tensor, local(weight.tensor).detach().clone()))
                    for name, now in weight.parts():
                        _edit(name, now, weight, plan, layer, written)
                norms[layer] = (before, _norm(site))
        yield Edit("baked", tuple(norms), plan.strength, "weights", plan.note, norms, schedule=plan.schedule)


def _edit(name: str, now: Tensor, weight: Weight, plan: Plan, layer: int, written: Mapping[str, Tensor]) -> None:
    """Edit one matrix or bias in place. written: tensors of a baked checkpoint, which are used where there is one."""
    strength, held = plan.number_at(layer), written.get(name)
    edited = bake_weight(now, plan.projections[layer], strength)
    edited = edited if held is None else part_of(held.to(now), weight.tensor)
    overflows = bool(torch.isfinite(now).all()) and not bool(torch.isfinite(edited).all())
    if bool(total(torch.tensor(float(overflows), device=now.device), weight.tensor)):
        raise KernelSurgeryError(
            f"cannot bake {plan.sites[layer].name}: at strength {strength:g}, some elements are beyond the largest "
            f"number of {now.dtype}. The model is unchanged. Choose a strength nearer to 1."
        )
    now.copy_(edited)


def refuse_without_weights(plan: Plan, mode: str) -> None:
    """Raise KernelSurgeryError for an edit of the output of a norm, which no weight makes."""
    if bare := [site.name for site in plan.sites.values() if not site.weights and site.quantised is None]:
        raise KernelSurgeryError(f"mode {mode} cannot edit {bare[0]}: {AFTER_A_NORM} The model is unchanged.")


def _refuse_quantised(plan: Plan) -> None:
    """Raise KernelSurgeryError for weights that are quantised in memory."""
    if names := [site.quantised for site in plan.sites.values() if site.quantised]:
        raise KernelSurgeryError(
            f"cannot bake {names[0]}: it is quantised in memory, and an edit of its numbers would be rounded by its "
            "format. The model is unchanged. Use mode hook, fused or lora, which leave it as it is. In the files, "
            "python -m kernel_surgery.bake --dequantize or --requantize edits the formats that it knows."
        )


def _norm(site: MlpSite) -> float:
    """Return the Frobenius norm of the matrices that write into an output, in float32, of all their parts together."""

    def norm(weight: Tensor) -> float:
        part = local(weight).float().norm()
        return float(total(part.double().square(), weight).sqrt() if is_split(weight) else part)

    return math.hypot(*(norm(weight.tensor) for weight in site.weights if weight.matrix))


@contextmanager
def _restored(plan: Plan, marks: Mapping[int, Mark]) -> Iterator[None]:
    """Put the original weights back when the block ends. Raises KernelSurgeryError if an inner block is still open."""
    try:
        yield
    finally:
        still_open = [mode for layer, site in plan.sites.items() if (mode := put_back(site, marks[layer]))]
    if still_open:
        raise KernelSurgeryError(
            f"a block of mode {still_open[0]} that was opened inside this baked one is still open. "
            "Blocks must end in reverse order. The original weights are back when it ends; until then the model is "
            "neither the original nor edited by that block alone."
        )
