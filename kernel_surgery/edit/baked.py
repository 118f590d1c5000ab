"""The edit in the weights of a model in memory (weight orthogonalization): W <- W - a U (U^T W)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.plan import Edit, SubspaceLike, plan_edit
from kernel_surgery.numerics.precision import computed_in, in_full

ROWS_AT_ONCE = 256


def remove(weight: Tensor, basis: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """(W - a U (U^T W) as a new tensor of W's dtype, U^T W in float32 [k, columns]).

    weight [d_model, d_ff], or a bias [d_model]; basis [d_model, k]. Float32 arithmetic (float64 for a float64 weight),
    one rounding at the end: `reference.baked_element_bound`. P = I - U U^T is never formed: rounded to bfloat16 it
    would leave a fifth of the elements wrong.
    """
    wide = computed_in(weight)
    w, u = weight.detach().reshape(weight.shape[0], -1), basis.to(weight.device, wide)
    # On a CPU some rows at a time: float32 copies of a whole large weight are fresh pages again and again, which took
    # two thirds of the time. In a cache they cost little, and the sums over rows stay float32.
    step = ROWS_AT_ONCE if w.device.type == "cpu" else max(1, w.shape[0])
    parts = [slice(start, start + step) for start in range(0, w.shape[0], step)]
    inside = torch.zeros(u.shape[1], w.shape[1], dtype=wide, device=w.device)
    made = torch.empty_like(w, memory_format=torch.contiguous_format)
    with in_full(weight):
        for part in parts:
            inside.addmm_(u[part].T, w[part].to(wide))
        for part in parts:
            made[part] = torch.addmm(w[part].to(wide), u[part], inside, alpha=-strength)
    return made.reshape(weight.shape), inside.to(torch.promote_types(weight.dtype, torch.float32))


def bake_weight(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """W - a U (U^T W) as a new tensor of W's dtype: the first of what `remove` returns."""
    return remove(weight, basis, strength)[0]


@contextmanager
def baked(
    model: nn.Module,
    subspace: SubspaceLike,
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> Iterator[Edit]:
    """While the block lasts, `down_proj` of every layer of `subspace` holds W - a U (U^T W); its bias likewise.

    The parameters stay the same objects (optimizers and compiled code see the edit). Their original values are kept
    beside them, on their device, and put back bit for bit when the block ends, by an exception too. layers, force: as
    in `hook.hooked`. Raises what `edit.plan_edit` raises, and ValueError for a weight shared by two of the layers,
    before anything is changed.
    """
    plan = plan_edit(model, subspace, strength, layers, force)
    owners: dict[int, str] = {}
    for site in plan.sites.values():
        pointer = site.module.weight.data_ptr()
        if pointer in owners and pointer != 0:
            raise KernelSurgeryError(
                f"cannot bake {site.name}: it shares its weight with {owners[pointer]}, and one tensor cannot hold "
                "two edits.\n"
                "No weight was changed. Use the fused mode, which leaves weights alone."
            )
        owners[pointer] = site.name
    kept: list[tuple[nn.Parameter, Tensor]] = []
    norms: dict[int, tuple[float, float]] = {}
    try:
        with torch.no_grad():
            for layer, site in plan.sites.items():
                before = float(site.module.weight.float().norm())
                for parameter in (site.module.weight, site.module.bias):
                    if parameter is not None:
                        kept.append((parameter, parameter.detach().clone()))
                        parameter.copy_(bake_weight(parameter, plan.bases[layer], plan.strength))
                norms[layer] = (before, float(site.module.weight.float().norm()))
        yield Edit("baked", tuple(norms), plan.strength, "weights", plan.note, norms)
    finally:
        with torch.no_grad():
            for parameter, original in reversed(kept):
                parameter.copy_(original)
