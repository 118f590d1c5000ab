"""Command: certify the edit, of a model in every mode or of files on disk.

    python -m kernel_surgery.verify --model SRC --subspace S [--baked DST] [--out certificate.json]
    python -m kernel_surgery.verify --baked DST [--model SRC]
    python -m kernel_surgery.verify --adapter DIR [--model SRC]
    python -m kernel_surgery.verify --restored DIR [--model SRC]

The first form checks a model (`certify.model`). It compares hook, fused, baked and lora with the exact edit and with
each other, layer by layer and end to end. The other forms check files (`certify.files`). With SRC, every edited element
is checked against its error bound.

Exit status: 0 if everything holds; 1 if a check fails, with the layer named; 2 for input that cannot be verified.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, check_finite_strength, command_line, main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("verify", description="Check the edit: of a model in every mode, of a baked checkpoint, of an adapter.")
    p.add_argument("--model", help='the original: "polyglot", a folder, or a hub id')
    p.add_argument("--subspace", type=Path, help="subspace file (default with --model polyglot: the one shipped)")
    p.add_argument("--baked", type=Path, help="folder that python -m kernel_surgery.bake has written")
    p.add_argument("--adapter", type=Path, help="folder that python -m kernel_surgery.lora has written")
    p.add_argument("--restored", type=Path, help="folder that python -m kernel_surgery.bake --undo has written")
    p.add_argument("--out", type=Path, help="JSON file for the certificate; its plot goes beside it, as .svg")
    p.add_argument("--strength", type=float, help="of the edit (default: 1, or what --baked was made with)")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: as the files have it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--prompts", type=int, default=8, help="sequences that are sampled (default 8)")
    more = "greedy tokens after each (default 16); the model is read once for each"
    p.add_argument("--new-tokens", type=int, default=16, help=more)
    more = "load the whole model too, edit all layers at once and decode (default: where it takes 2 GB or less)"
    p.add_argument("--whole", action="store_true", default=None, help=more)
    p.add_argument("--seed", type=int, default=0, help="which prompts")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def check(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Check options that depend on each other.

    folders: {name: folder} of --baked, --adapter and --restored, if given. Raises UserError.
    """
    if not folders and args.model is None:
        raise UserError("give --model, --baked, --adapter or --restored. Nothing was verified.")
    if len(folders) > 1:
        raise UserError(f"give one of --{' and --'.join(folders)} at a time. Nothing was verified.")
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(f"no folder at {str(folder)!r}. Nothing was verified.")
    for name, least, most in (("prompts", 1, 256), ("new_tokens", 0, 1024)):
        if not least <= getattr(args, name) <= most:
            value = getattr(args, name)
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} and at most {most}, got {value}.")
    check_finite_strength(args.strength)
    if args.subspace is None and not folders and args.model != "polyglot":
        raise UserError(f"--model {args.model} needs --subspace, or --baked. Nothing was verified.")
    if args.out is not None and args.out.suffix == ".svg":
        raise UserError(f"--out {str(args.out)!r} is where the plot would go: name the JSON file.")


def run(argv: list[str] | None = None) -> int:
    """Print the certificate. Return 1 if a check fails, else 0. Raises UserError for unusable options."""
    args = parser().parse_args(argv)
    folders = {name: getattr(args, name) for name in ("baked", "adapter", "restored") if getattr(args, name)}
    check(args, folders)

    from kernel_surgery.certify.files import verify_adapter, verify_checkpoint, verify_restored
    from kernel_surgery.certify.render import shown, write
    from kernel_surgery.certify.whole import verify_model
    from kernel_surgery.checkpoint.record import read_provenance
    from kernel_surgery.models.load import POLYGLOT_SUBSPACE, local_folder, resolve_model

    subspace = args.subspace
    if subspace is None and args.model == "polyglot" and not folders:
        subspace = POLYGLOT_SUBSPACE
    source = None if args.model is None else local_folder(resolve_model(args.model))
    for kind, folder in folders.items():
        recorded_strength = float(read_provenance(folder, kind)["strength"])
        if args.strength not in (None, recorded_strength):
            raise UserError(f"{str(folder)!r} was made at strength {recorded_strength:g}, not {args.strength:g}.")
    if args.adapter is not None:
        certificate = verify_adapter(args.adapter, source, subspace)
    elif args.restored is not None:
        certificate = verify_restored(args.restored, source, subspace)
    elif source is not None and subspace is not None:
        names = ("baked", "strength", "dtype", "device", "prompts", "new_tokens", "seed", "whole", "force")
        options = {name: getattr(args, name) for name in names}
        certificate = verify_model(source, subspace, model_id=args.model, **options)
    else:
        certificate = verify_checkpoint(args.baked, source, subspace)
    certificate["command"] = command_line("verify", argv)
    if args.out:
        write(args.out, certificate)
    print(shown(certificate))
    return 1 if certificate["faults"] else 0


if __name__ == "__main__":
    main(run)
