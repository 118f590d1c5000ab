"""The edit in the weights (weight orthogonalization): W <- W - a U (U^T W), in memory or as a checkpoint.

python -m kernel_surgery.bake --model SRC --subspace S --out DST
python -m kernel_surgery.bake --undo --model BAKED --out RESTORED
"""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kernel_surgery.edit import Edit, SubspaceLike


ROWS_AT_ONCE = 256


def remove(weight: "Tensor", basis: "Tensor", strength: float = 1.0) -> "tuple[Tensor, Tensor]":
    """(W - a U (U^T W) as a new tensor of W's dtype, U^T W in float32 [k, columns]).

    weight [d_model, d_ff], or a bias [d_model]; basis [d_model, k]. Float32 arithmetic (float64 for a float64 weight),
    one rounding at the end: `reference.baked_element_bound`. P = I - U U^T is never formed: rounded to bfloat16 it
    would leave a fifth of the elements wrong.
    """
    import torch

    from kernel_surgery.reference import computed_in, in_full

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


def bake_weight(weight: "Tensor", basis: "Tensor", strength: float = 1.0) -> "Tensor":
    """W - a U (U^T W) as a new tensor of W's dtype: the first of what `remove` returns."""
    return remove(weight, basis, strength)[0]


@contextmanager
def baked(
    model: "nn.Module",
    subspace: "SubspaceLike",
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> "Iterator[Edit]":
    """While the block lasts, `down_proj` of every layer of `subspace` holds W - a U (U^T W); its bias likewise.

    The parameters stay the same objects (optimizers and compiled code see the edit). Their original values are kept
    beside them, on their device, and put back bit for bit when the block ends, by an exception too. layers, force: as
    in `hook.hooked`. Raises what `edit.plan_edit` raises, and ValueError for a weight shared by two of the layers,
    before anything is changed.
    """
    import torch

    from kernel_surgery.edit import Edit, plan_edit

    plan = plan_edit(model, subspace, strength, layers, force)
    owners: dict[int, str] = {}
    for site in plan.sites.values():
        pointer = site.module.weight.data_ptr()
        if pointer in owners and pointer != 0:
            raise ValueError(
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Write a checkpoint with the edit in its weights.")
    p.add_argument("--model", required=True, help='"polyglot", a folder, or a hub id')
    p.add_argument("--subspace", type=Path, help="subspace file (safetensors)")
    p.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    p.add_argument("--strength", type=float, default=1.0, help="1 removes the subspace (default), 2 reflects it")
    p.add_argument("--undo", action="store_true", help="take the edit of a baked checkpoint back")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def run(argv: list[str] | None = None) -> int:
    """Check that the subspace belongs to the checkpoint, bake (or undo), print the norm change of every layer."""
    import math

    args = parser().parse_args(argv)
    if not math.isfinite(args.strength):
        raise cli.UserError(f"--strength must be a finite number, got {args.strength}.")
    if args.undo == (args.subspace is not None):
        raise cli.UserError("give --subspace to bake, or --undo to take an edit back, not both. Nothing was written.")
    command = cli.command_line("kernel_surgery.bake", argv)
    source = cli.resolve_model(args.model)

    from kernel_surgery.checkpoint import bake_checkpoint, local_folder, undo_checkpoint
    from kernel_surgery.subspace import Subspace

    if args.undo:
        norms = undo_checkpoint(local_folder(source), args.out, command=command)
        show(norms)
        print(f"{args.out}: the edit of {len(norms)} tensors taken back, to within a rounding")
        return 0
    subspace = Subspace.load(args.subspace, force=args.force)
    folder = local_folder(source)
    options = {"strength": args.strength, "model_id": args.model, "force": args.force, "command": command}
    show(bake_checkpoint(folder, subspace, args.out, **options))
    if subspace.note:
        print(subspace.note)
    print(f"{args.out}: {len(subspace.layers)} layers edited, rank {subspace.rank}, strength {args.strength:g}")
    return 0


def show(norms: dict[str, tuple[float, float]]) -> None:
    """One line a tensor."""
    for name, (before, after) in norms.items():
        print(f"  {name}: norm {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    cli.main(run)
