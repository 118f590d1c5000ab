"""Command: write a checkpoint with the edit in its weights (weight orthogonalization), or undo one.

    python -m kernel_surgery.bake --model SRC --subspace S --out DST
    python -m kernel_surgery.bake --model QUANTISED --subspace S --out DST --dequantize|--requantize
    python -m kernel_surgery.bake --undo --model BAKED --out RESTORED

The edit is W <- W - a A (B^T W), in every matrix that writes into an MLP block's output. The work is done in
`checkpoint.baking`.
"""

import argparse
import math
from functools import partial
from pathlib import Path

from kernel_surgery.common.command import (
    Parser,
    add_base,
    add_damage,
    check_finite_strength,
    command_line,
    main,
    untouched,
)
from kernel_surgery.common.ending import Following, next_command, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("bake", description="Write a checkpoint with the edit in its weights, or undo one.")
    p.add_argument("--model", required=True, help='"polyglot" (the embedded model), a folder, or a Hugging Face id')
    p.add_argument("--subspace", type=Path, help="subspace file from kernel_surgery.fit")
    p.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    more = "1 removes the subspace (default), 2 reflects it, 0 changes nothing"
    p.add_argument("--strength", type=float, default=1.0, help=more)
    p.add_argument("--undo", action="store_true", help="restore the weights of a baked checkpoint, to within rounding")
    formats = p.add_mutually_exclusive_group()
    more = "of a quantised checkpoint, write everything as bfloat16"
    formats.add_argument("--dequantize", action="store_true", help=more)
    more = "of a quantised checkpoint, write the edited matrices back in their own format"
    formats.add_argument("--requantize", action="store_true", help=more)
    add_base(p)
    add_damage(p)
    return p


@untouched("No checkpoint was written.")
def run(argv: list[str] | None = None) -> int:
    """Bake or undo, and print the change of every tensor's norm. Return 0.

    Raises UserError for options that do not go together, and what `checkpoint.baking` raises. The subspace must belong
    to the checkpoint.
    """
    args = parser().parse_args(argv)
    check_finite_strength(args.strength)
    if args.undo and args.subspace is not None:
        raise UserError("give --subspace to bake or --undo to undo an edit, not both.")
    if not args.undo and args.subspace is None:
        raise UserError("--subspace is missing: the file from python -m kernel_surgery.fit. Or give --undo.")
    quantised = "dequantize" if args.dequantize else "requantize" if args.requantize else None
    if args.undo and quantised:
        raise UserError(f"--undo restores the weights as they were baked: omit --{quantised}.")
    if args.undo and args.base_model:
        raise UserError("--undo brings the original's own card back: omit --base-model.")
    check_output(args.out)

    with waiting("starting"):
        from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
        from kernel_surgery.checkpoint.record import read_provenance
        from kernel_surgery.damage.before import damage_before_writing, languages_measured
        from kernel_surgery.models.load import findable, local_folder, resolve_checkpoint
        from kernel_surgery.models.stored import counted, layout_in, layouts, parts
        from kernel_surgery.subspace.artifact import Subspace

    if args.undo and Path(args.model).is_dir():
        read_provenance(Path(args.model))  # first: an adapter is no model, and is better named
    command, source = command_line("bake", argv), resolve_checkpoint(args.model)
    if args.undo:
        norms = undo_checkpoint(local_folder(source), args.out, command=command)
        show(norms)
        print(f"the edit of {len(norms)} tensors undone, to within rounding")
        wrote(args.out)
        original = findable(read_provenance(args.out, "restored")["model_id"])
        next_command(Following("verify", ["--restored", args.out, *(["--model", original] if original else [])]))
        return 0
    subspace = Subspace.load(args.subspace, force=bool(args.force))
    languages = languages_measured(args.languages, subspace)
    folder = local_folder(source)
    options = {"strength": args.strength, "model_id": args.model, "force": bool(args.force), "command": command}
    options |= {"quantised": quantised, "base": args.base_model}
    how = {"languages": languages, "force": args.force, "skip": args.no_damage, "say": partial(print, flush=True)}
    options["measure"] = partial(damage_before_writing, folder, subspace, "baked", args.strength, **how)
    show(bake_checkpoint(folder, subspace, args.out, **options))
    kind = layout_in(folder)
    changed = counted(parts(kind, layouts(folder), subspace.layers))
    if note := subspace.note_on(kind):
        print(note)
    about = f"rank {subspace.rank}, strength {args.strength:g}"
    print(f"{len(subspace.layers)} layers edited ({changed}), {about}")
    wrote(args.out)
    next_command(Following("verify", ["--baked", args.out, "--model", args.model]))
    return 0


def show(norms: dict[str, tuple[float, float]]) -> None:
    """Print one line per tensor. Experts that differ in their number alone share a line, with the norm of them all."""
    from kernel_surgery.models.table import without_number

    alike: dict[str, list[tuple[float, float]]] = {}

    def place(name: str) -> list[tuple[bool, int, str]]:
        """Layer 8 comes before layer 10."""
        return [(word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]

    for name, pair in sorted(norms.items(), key=lambda item: place(item[0])):
        alike.setdefault(without_number(name), []).append(pair)
    for name, pairs in alike.items():
        before, after = (math.hypot(*side) for side in zip(*pairs, strict=True))
        many = f" ({len(pairs)} experts)" if "*" in name else ""
        print(f"  {name}{many}: norm {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main(run)
