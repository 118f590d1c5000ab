"""The equivalence certificate: what an edit does, in every mode, and what an applier has left on disk.

python -m kernel_surgery.verify --model SRC --subspace S [--baked DST] [--out certificate.json]
python -m kernel_surgery.verify --baked DST [--model SRC]
python -m kernel_surgery.verify --adapter DIR [--model SRC]
python -m kernel_surgery.verify --restored DIR [--model SRC]

Of a model (the first form): hook, fused, baked and lora are held, layer by layer and end to end, to the exact edit and
to each other (`certify.py`).

Of a baked checkpoint: every file is hashed again, and for every edited tensor the leak, norm(U^T W' - (1-a) U^T W) over
norm(U^T W), is computed from the file and held to 1.1 times its floor, the leak that correct rounding leaves. With SRC
too, whatever the hashes say: every edited element is held to its bound (`reference.baked_element_bound`), and every
other tensor must be equal to the byte. float64 arithmetic, a block of columns of one tensor in memory at a time.

Of an adapter: its hashes, B = -U to the bit, and with SRC A = a U^T W within its bound. Of a checkpoint whose edit was
taken back: its hashes, and with SRC how far every element is from the original.

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
    from kernel_surgery.provenance import PROVENANCE, changed_files

    faults = changed_files(folder, record["sha256"])
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    unknown = sorted(there - record["sha256"].keys() - {PROVENANCE})
    return faults + [f"{name} was not there when the checkpoint was written" for name in unknown]


def check_others(folder: Path, source: Path | None) -> list[str]:
    """What lies in a baked or restored folder beside its weights: each file the original's, to the byte, or our own."""
    from kernel_surgery.checkpoint import BASE_CARD, UNDO, others, weight_files
    from kernel_surgery.provenance import BASES, PROVENANCE

    weights = {file.name for file in weight_files(folder)}
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    faults = [
        f"{name} holds weights that are not the checkpoint's"
        for name in sorted(there)
        if name.endswith(".safetensors") and name not in weights | {UNDO.as_posix(), BASES.as_posix()}
    ]
    if source is None:
        return faults
    own = weights | {PROVENANCE, "README.md", BASE_CARD, UNDO.as_posix(), BASES.as_posix()}
    along = {file.name: file for file in others(source)[0] if file.name not in weights}
    for name in sorted(there.keys() - own | (along.keys() - {"README.md"})):
        if name not in along:
            faults.append(f"{name} is not in the original")
        elif name not in there:
            faults.append(f"{name} of the original is missing")
        elif stream.sha256(there[name]) != stream.sha256(along[name]):
            faults.append(f"{name} is not the original's")
    return faults


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
    from kernel_surgery.checkpoint import UNDO, edited_name, located
    from kernel_surgery.checks import broken, check_tensor
    from kernel_surgery.provenance import opened, read_bases, read_provenance

    record = read_provenance(folder)
    bases = read_bases(folder, record, UNDO)
    with opened(folder / UNDO) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    faults, rows = check_files(folder, record) + check_others(folder, source), []
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


def verify_adapter(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of an adapter's files, as `verify_checkpoint` has it.

    B must be -U to the bit, what fills the rank up zero, and the scaling 1; with the original, A is held to
    `reference.adapter_bound`, and "leak_bfloat16" says what of U^T W an engine leaves that rounds A and B to bfloat16.
    """
    import torch

    from kernel_surgery.checkpoint import located
    from kernel_surgery.lora import CONFIG, PREFIX, WEIGHTS, configuration
    from kernel_surgery.provenance import opened, read_bases, read_provenance
    from kernel_surgery.reference import adapter_bound, worst_ratio

    record = read_provenance(folder, "adapter")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        expected_rank = int(record["padded_rank"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} is no configuration of an adapter ({error}).") from error
    bases = read_bases(folder, record)
    faults, rows = check_files(folder, record), []
    if subspace is not None:
        bases, wrong = basis_faults(bases, subspace, folder)
        faults += wrong
    expected = configuration(record)
    for key in sorted(config.keys() | expected.keys()):
        if config.get(key) != expected.get(key) or (key in config) != (key in expected):
            faults.append(f"{CONFIG}: {key} is {config.get(key)!r}, not {expected.get(key)!r}")
    old = {} if source is None else located(source)
    with opened(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer, basis in cli.progress(bases.items(), total=len(bases), desc="verify"):
        module = f"model.layers.{layer}.mlp.down_proj"
        a, b = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
        k, d = basis.shape[1], basis.shape[0]
        if a is None or b is None or a.shape[0] < k or tuple(b.shape) != (d, len(a)) or len(a) != expected_rank:
            faults.append(f"layer {layer}: {module}: A or B is missing, or of another shape")
            continue
        if not torch.equal(b[:, :k], -basis):
            faults.append(f"layer {layer}: {module}: B is not -U")
        if a[k:].any() or b[:, k:].any():
            faults.append(f"layer {layer}: {module}: what fills the rank up is not zero")
        row = {"layer": layer, "tensor": f"{module}.lora_A", "dtype": str(a.dtype).removeprefix("torch.")}
        row |= {"error_over_bound": None, "leak_bfloat16": None, "finite": bool(torch.isfinite(a).all())}
        if source is not None:
            if f"{module}.weight" not in old or old[f"{module}.weight"][1].shape != (d, a.shape[1]):
                faults.append(f"layer {layer}: {module}: the original has no weight of shape {(d, a.shape[1])}")
                continue
            weight, strength = read(old[f"{module}.weight"]), float(record["strength"])
            inside = basis.double().T @ weight.double()
            error = (a[:k].double() - strength * inside).abs()
            row["error_over_bound"] = worst_ratio(error, adapter_bound(weight, strength))
            rounded = basis.double().T @ b.bfloat16().double() @ a.bfloat16().double() + strength * inside
            row["leak_bfloat16"] = float(rounded.norm() / inside.norm())
            if not row["error_over_bound"] <= 1:
                faults.append(f"layer {layer}: {module}: A is {row['error_over_bound']:.3g} times its bound off")
        if not row["finite"]:
            faults.append(f"layer {layer}: {module}: A holds NaN or Inf")
        if a.dtype != torch.float32 or b.dtype != torch.float32:
            faults.append(f"layer {layer}: {module}: A is {a.dtype}, B {b.dtype}; both should be float32")
        rows.append(row)
    faults += [f"{name} is of no layer of the subspace" for name in sorted(tensors)]
    return {
        "kind": "certificate",
        "of": {"adapter": str(folder), "model": None if source is None else str(source)},
        **({"note": "A was not compared with a U^T W: give --model for that"} if source is None else {}),
        **{"model_id": record["model_id"], "strength": record["strength"], "rank": record["rank"]},
        **{"tensors": rows, "faults": faults, "environment": cli.environment()},
    }


def verify_restored(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of a checkpoint whose edit was taken back, as `verify_checkpoint` has it.

    With the original: every tensor that was edited is within `reference.undo_bound` of it, every other equal to the
    byte. Without it, hashes alone.
    """
    from kernel_surgery.bake import bake_weight
    from kernel_surgery.checkpoint import edited_name, located
    from kernel_surgery.provenance import read_bases, read_provenance
    from kernel_surgery.reference import undo_bound, worst_ratio

    record = read_provenance(folder, "restored")
    bases = read_bases(folder, record)
    faults, rows = check_files(folder, record) + check_others(folder, source), []
    if subspace is not None:
        bases, wrong = basis_faults(bases, subspace, folder)
        faults += wrong
    new, old = located(folder), {} if source is None else located(source)
    if source is not None:
        faults += [f"{name} is in one of the two checkpoints only" for name in sorted(new.keys() ^ old.keys())]
    for name in cli.progress(sorted(new.keys() & old.keys()), total=len(new), desc="verify"):
        layer = edited_name(name, bases)
        if layer is None:
            if not same_bytes(new[name], old[name]):
                faults.append(f"{name} was never edited, and differs from the original")
            continue
        back, weight = read(new[name]), read(old[name])
        if (back.shape, back.dtype) != (weight.shape, weight.dtype):
            faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
            continue
        basis, strength, worst = bases[layer], float(record["strength"]), 0.0
        for start in range(0, weight.shape[1], 1024):
            part = weight[:, start : start + 1024]
            off = (back[:, start : start + 1024].double() - part.double()).abs()
            bound = undo_bound(part, bake_weight(part, basis, strength), basis, strength)
            worst = max(worst, worst_ratio(off, bound))
        rows.append({"layer": layer, "tensor": name, "dtype": new[name][1].dtype, "error_over_bound": worst})
        if not worst <= 1:
            faults.append(f"layer {layer}: {name}: an element is {worst:.3g} times its bound away from the original")
    return {
        "kind": "certificate",
        "of": {"restored": str(folder), "model": None if source is None else str(source)},
        **{"model_id": record["model_id"], "strength": record["strength"], "rank": record["rank"]},
        **{"tensors": rows, "faults": faults, "environment": cli.environment()},
    }


def stored_dtype(folder: Path, layer: int) -> str:
    """The dtype of a layer's down_proj in the files, by its name in torch. Raises UserError for what is no float."""
    from kernel_surgery.checkpoint import located

    name = f"model.layers.{layer}.mlp.down_proj.weight"
    place = located(folder).get(name)
    found = None if place is None else stream.EDITABLE.get(place[1].dtype)
    if found not in cli.DTYPES:
        stored = "missing" if place is None else f"stored as {place[1].dtype}"
        raise cli.UserError(f"{name} in {str(folder)!r} is {stored}: only {', '.join(cli.DTYPES)} can be certified.")
    return found


def verify_model(args: argparse.Namespace, source: Path, subspace_path: Path) -> dict:
    """The certificate of a model in every mode, those of its files included where --baked is given."""
    from kernel_surgery.certify import certify
    from kernel_surgery.checkpoint import check_source, weight_files
    from kernel_surgery.provenance import read_provenance
    from kernel_surgery.subspace import Subspace

    subspace = Subspace.load(subspace_path, force=args.force)
    check_source(source, [stream.read_layout(f) for f in weight_files(source)], subspace, force=args.force)
    stored = stored_dtype(source, subspace.layers[0])
    dtype = stored if args.dtype == "auto" else args.dtype
    strength = 1.0 if args.strength is None else args.strength
    certificate = {"kind": "certificate", "of": {"baked": None, "model": str(source)}, "tensors": [], "faults": []}
    if args.baked is not None:
        strength = float(read_provenance(args.baked)["strength"])
        if dtype != stored:
            raise cli.UserError(f"a baked checkpoint is certified in the dtype it is stored in, {stored}, not {dtype}.")
        certificate = verify_checkpoint(args.baked, source, subspace_path)
    import torch

    options = {"dtype": getattr(torch, dtype), "device": cli.parse_device(args.device), "strength": strength}
    options |= {"prompts": args.prompts, "new_tokens": args.new_tokens, "seed": args.seed, "made": args.baked}
    options["whole"] = args.whole
    model = certify(source, subspace, **options)
    certificate |= {"model_id": args.model, "strength": strength, "rank": subspace.rank, "note": subspace.note}
    certificate["faults"] = certificate["faults"] + model.pop("faults")
    return certificate | {"model": model, "environment": cli.environment(options["device"])}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Check the edit: of a model in every mode, of a baked checkpoint, of an adapter.")
    p.add_argument("--model", help='the original: "polyglot", a folder, or a hub id')
    p.add_argument("--subspace", type=Path, help="subspace file (default with --model polyglot: the one shipped)")
    p.add_argument("--baked", type=Path, help="folder that python -m kernel_surgery.bake has written")
    p.add_argument("--adapter", type=Path, help="folder that python -m kernel_surgery.lora has written")
    p.add_argument("--restored", type=Path, help="folder that python -m kernel_surgery.bake --undo has written")
    p.add_argument("--out", type=Path, help="JSON file for the certificate; its plot goes beside it, as .svg")
    p.add_argument("--strength", type=float, help="of the edit (default: 1, or what --baked was made with)")
    p.add_argument("--dtype", default="auto", choices=("auto", *cli.DTYPES), help="auto: as the files have it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--prompts", type=int, default=8, help="sequences that are sampled (default 8)")
    more = "greedy tokens after each (default 16); the model is read once for each"
    p.add_argument("--new-tokens", type=int, default=16, help=more)
    more = "load the whole model too, edit all layers at once and decode (default: where it takes 2 GB or less)"
    p.add_argument("--whole", action="store_true", default=None, help=more)
    p.add_argument("--seed", type=int, default=0, help="which prompts")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the table; 1 if something is broken."""
    args = parser().parse_args(argv)
    written = {name: getattr(args, name) for name in ("baked", "adapter", "restored") if getattr(args, name)}
    if not written and args.model is None:
        raise cli.UserError("give --model, --baked, --adapter or --restored. Nothing was verified.")
    if len(written) > 1:
        raise cli.UserError(f"give one of --{' and --'.join(written)} at a time. Nothing was verified.")
    for folder in written.values():
        if not folder.is_dir():
            raise cli.UserError(f"no folder at {str(folder)!r}. Nothing was verified.")
    for name, least, most in (("prompts", 1, 256), ("new_tokens", 0, 1024)):
        if not least <= getattr(args, name) <= most:
            given = getattr(args, name)
            raise cli.UserError(f"--{name.replace('_', '-')} must be at least {least} and at most {most}, got {given}.")
    if args.strength is not None and not math.isfinite(args.strength):
        raise cli.UserError(f"--strength must be a finite number, got {args.strength}.")
    subspace = args.subspace
    if subspace is None and args.model == "polyglot" and not written:
        subspace = cli.POLYGLOT / "subspace.safetensors"
    if subspace is None and not written:
        raise cli.UserError(f"--model {args.model} needs --subspace, or --baked. Nothing was verified.")
    if args.out is not None and args.out.suffix == ".svg":
        raise cli.UserError(f"--out {str(args.out)!r} is where the plot would go: name the JSON file.")
    command = cli.command_line("kernel_surgery.verify", argv)

    from kernel_surgery.certificate import shown, write
    from kernel_surgery.checkpoint import local_folder
    from kernel_surgery.provenance import read_provenance

    source = None if args.model is None else local_folder(cli.resolve_model(args.model))
    for kind, folder in written.items():
        made_with = float(read_provenance(folder, kind)["strength"])
        if args.strength not in (None, made_with):
            raise cli.UserError(f"{str(folder)!r} was made at strength {made_with:g}, not {args.strength:g}.")
    if args.adapter is not None:
        certificate = verify_adapter(args.adapter, source, subspace)
    elif args.restored is not None:
        certificate = verify_restored(args.restored, source, subspace)
    elif source is not None and subspace is not None:
        certificate = verify_model(args, source, subspace)
    else:
        certificate = verify_checkpoint(args.baked, source, subspace)
    certificate["command"] = command
    if args.out:
        write(args.out, certificate)
    print(shown(certificate))
    return 1 if certificate["faults"] else 0


if __name__ == "__main__":
    cli.main(run)
