"""What a baked checkpoint says of itself, checked against its bytes; and against the original, where that is at hand.

python -m kernel_surgery.verify --baked DST [--model SRC] [--subspace S] [--out certificate.json]

From DST alone: every file is hashed again, and for every edited tensor the leak, norm(U^T W' - (1-a) U^T W) over
norm(U^T W), is computed from the file and held to 1.1 times its floor, the leak that correct rounding leaves. With SRC
too, whatever the hashes say: every edited element is held to its bound (`reference.baked_element_bound`), and every
other tensor must be equal to the byte. float64 arithmetic, a block of columns of one tensor in memory at a time.

Exit status 0 if everything holds; 1 if not, with the layer named; 2 for input that cannot be verified.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli, stream

if TYPE_CHECKING:
    import torch

LEAK_GATE = 1.1  # leak over floor, for a weight; `leak_gate` for anything smaller
COLUMNS = 1024  # of a weight, in float64, at a time: 16 MB at d_model 2048


def check_tensor(
    after: "torch.Tensor", before: "torch.Tensor | None", inside: "torch.Tensor", basis: "torch.Tensor", strength: float
) -> dict[str, float | None]:
    """One edited tensor: {"error_over_bound", "leak", "leak_floor", "leak_over_floor", "leak_gate", "finite"}.

    after, before [d_model, columns] as stored; without `before` (None) the first is None. inside: U^T W [k, columns];
    from `before` where there is one. Everything infinite where something is not finite.
    """
    import torch

    from kernel_surgery.reference import bake_oracle, baked_element_bound, storage_noise, worst_ratio

    u = basis.double()
    worst, kept, whole, noise = 0.0, 0.0, 0.0, 0.0
    for start in range(0, after.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        new = after[:, part].double()
        held = inside[:, part].double()
        if before is not None:
            old = before[:, part]
            held = u.T @ old.double()
            off = (new - bake_oracle(old, basis, strength)).abs()
            worst = max(worst, worst_ratio(off, baked_element_bound(old, basis, strength)))
        kept += float((u.T @ new - (1 - strength) * held).square().sum())
        whole += float(held.square().sum())
        noise += storage_noise(after[:, part], basis) ** 2
    # A bias of zeros holds nothing of the subspace and leaks nothing.
    leak = math.sqrt(kept / whole) if whole else math.inf if kept else 0.0
    floor = math.sqrt(noise / whole) if whole else 0.0
    over = leak / floor if floor else math.inf if leak else 0.0
    return {
        "error_over_bound": None if before is None else worst,
        "leak": leak if math.isfinite(leak) else math.inf,
        "leak_floor": floor,
        "leak_over_floor": over if math.isfinite(over) else math.inf,
        "leak_gate": leak_gate(basis.shape[1] * after.shape[1]),
        "finite": bool(torch.isfinite(after).all()),
    }


def leak_gate(samples: int) -> float:
    """How far the leak may lie above its floor: 1.1, and more where few samples are averaged.

    leak^2 / floor^2 is a mean of k * columns squares of mean 1 and variance 2 (sums of many roundings): seven of its
    standard deviations are 7 sqrt(2 / samples). For a weight that is nothing, for a bias it is most of the gate.
    """
    return max(LEAK_GATE, math.sqrt(1 + 7 * math.sqrt(2 / samples)))


def broken(row: dict) -> list[str]:
    """What a tensor breaks, in words; empty if nothing."""
    found = []
    if not row["finite"]:
        found.append("it holds NaN or Inf")
    if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1:
        found.append(f"an element is {row['error_over_bound']:.3g} times its bound away from what the edit gives")
    # A float32 tensor is rounded so finely that the arithmetic before shows too: only its elements are held to a bound.
    if row["dtype"] != "F32" and not row["leak_over_floor"] <= row["leak_gate"]:
        found.append(f"it leaks {row['leak_over_floor']:.3g} times its floor (allowed: {row['leak_gate']:.3g})")
    if row["dtype"] == "F32" and row["error_over_bound"] is None and not row["leak"] <= 2.0**-15:
        found.append(f"it leaks {row['leak']:.3g} (allowed in float32: {2.0**-15:.3g})")
    return found


def same_bytes(one: tuple[Path, stream.Entry], other: tuple[Path, stream.Entry]) -> bool:
    """Whether two tensors, each in its file, are the same to the byte."""
    (path, first), (path_2, second) = one, other
    size, done = first.end - first.begin, 0
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with path.open("rb") as mine, path_2.open("rb") as theirs:
        while done < size:
            n = min(stream.CHUNK, size - done)
            if os.pread(mine.fileno(), n, first.begin + done) != os.pread(theirs.fileno(), n, second.begin + done):
                return False
            done += n
    return True


def check_files(folder: Path, record: dict) -> list[str]:
    """Files whose hash is not the recorded one, that are missing, or that nobody recorded."""
    from kernel_surgery.checkpoint import PROVENANCE

    faults = []
    for name, digest in cli.progress(record["sha256"].items(), total=len(record["sha256"]), desc="hash"):
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif stream.sha256(folder / name) != digest:
            faults.append(f"{name} is not the file that was written (its SHA-256 differs from {PROVENANCE})")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    unknown = sorted(there - record["sha256"].keys() - {PROVENANCE})
    return faults + [f"{name} was not there when the checkpoint was written" for name in unknown]


def located(folder: Path) -> dict[str, tuple[Path, stream.Entry]]:
    """Where every tensor of a checkpoint lies."""
    from kernel_surgery.checkpoint import weight_files

    layouts = [stream.read_layout(file) for file in weight_files(folder)]
    return {name: (layout.path, entry) for layout in layouts for name, entry in layout.entries.items()}


def read(place: tuple[Path, stream.Entry]) -> "torch.Tensor":
    """One tensor, as [rows, columns]."""
    path, entry = place
    with path.open("rb") as file:
        tensor = stream.read_tensor(file.fileno(), entry)
    return tensor.reshape(tensor.shape[0], -1)


def basis_faults(bases: dict, subspace: Path, folder: Path) -> tuple[dict, list[str]]:
    """(the bases of a subspace file, where they are not those that the checkpoint was baked with)."""
    import torch

    from kernel_surgery.subspace import Subspace

    given = Subspace.load(subspace, force=True).bases
    if given.keys() != bases.keys() or any(given[i].shape != bases[i].shape for i in given):
        raise ValueError(
            f"{str(folder)!r} was baked with a subspace of layers {sorted(bases)}, {str(subspace)!r} has "
            f"{sorted(given)} (or another rank). Nothing was verified."
        )
    other = [i for i in given if not torch.equal(given[i], bases[i])]
    return given, [f"layer {i}: baked with another basis than {str(subspace)!r} has" for i in other]


def verify_checkpoint(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of a baked checkpoint, as a dict: "tensors" (a row each), "faults" (sentences), what it is of.

    source: the original checkpoint. subspace: the one it is said to be baked with (its bases replace those that were
    kept beside the weights). Raises ValueError for a folder that is no baked checkpoint, a subspace that does not fit
    it, and files that cannot be read.
    """
    from kernel_surgery.checkpoint import UNDO, edited_name, opened, read_provenance

    record = read_provenance(folder)
    with opened(folder / UNDO) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    bases = {int(n.removeprefix("basis.")): t for n, t in kept.items() if n.startswith("basis.")}
    faults, rows = check_files(folder, record), []
    if subspace is not None:
        bases, wrong = basis_faults(bases, subspace, folder)
        faults += wrong
    new, old = located(folder), {} if source is None else located(source)
    if source is not None:
        faults += [f"{name} is in one of the two checkpoints only" for name in sorted(new.keys() ^ old.keys())]
    for name in cli.progress(sorted(new), total=len(new), desc="verify"):
        layer = edited_name(name, bases)
        if layer is None:
            if name in old and not same_bytes(new[name], old[name]):
                faults.append(f"{name} was not to be edited, and differs from the original")
            continue
        after, before, inside = read(new[name]), None, kept.get(f"inside.{name}")
        if name in old:
            before = read(old[name])
            if (before.shape, before.dtype) != (after.shape, after.dtype):
                faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
                continue
        elif inside is None:
            faults.append(f"layer {layer}: {name}: what was removed is not on record, and without --model not known")
            continue
        row = {"layer": layer, "tensor": name, "dtype": new[name][1].dtype}
        row |= check_tensor(after, before, inside, bases[layer], float(record["strength"]))
        rows.append(row)
        faults += [f"layer {layer}: {name}: {what}" for what in broken(row)]
    for layer in bases:
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        if name not in new:
            faults.append(f"layer {layer}: {name} is missing")
    return {
        "kind": "certificate",
        "of": {"baked": str(folder), "model": None if source is None else str(source)},
        **{"model_id": record["model_id"], "strength": record["strength"], "rank": record["rank"]},
        **{"tensors": rows, "faults": faults, "environment": cli.environment()},
    }


def shown(certificate: dict) -> str:
    """The table, and the verdict in one line."""
    lines = [
        f"{'layer':>5} {'tensor':<40} {'dtype':<5} {'error/bound':>11} {'leak':>9} {'floor':>9} {'leak/floor':>10}"
    ]
    for r in certificate["tensors"]:
        error = "" if r["error_over_bound"] is None else f"{r['error_over_bound']:.3f}"
        lines.append(
            f"{r['layer']:>5} {r['tensor']:<40} {r['dtype']:<5} {error:>11} {r['leak']:>9.2e} {r['leak_floor']:>9.2e} "
            f"{r['leak_over_floor']:>10.3f}"
        )
    faults = certificate["faults"]
    lines += [f"broken: {fault}" for fault in faults]
    lines.append(
        f"{len(certificate['tensors'])} edited tensors: " + (f"{len(faults)} faults" if faults else "everything holds")
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Check a baked checkpoint against what it says of itself, and against the original.")
    p.add_argument("--baked", type=Path, required=True, help="folder that python -m kernel_surgery.bake has written")
    p.add_argument("--model", help='the original: "polyglot", a folder, or a hub id')
    p.add_argument("--subspace", type=Path, help="the subspace it is said to be baked with")
    p.add_argument("--out", type=Path, help="JSON file for the certificate")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if something is broken."""
    args = parser().parse_args(argv)
    if not args.baked.is_dir():
        raise cli.UserError(f"no folder at {str(args.baked)!r}. Nothing was verified.")
    from kernel_surgery.checkpoint import local_folder

    source = None if args.model is None else local_folder(cli.resolve_model(args.model))
    certificate = verify_checkpoint(args.baked, source, args.subspace)
    if args.out:
        cli.write_atomic(args.out, json.dumps(certificate, indent=2) + "\n")
    print(shown(certificate))
    return 1 if certificate["faults"] else 0


if __name__ == "__main__":
    cli.main(run)
