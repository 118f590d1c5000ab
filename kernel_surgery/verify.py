"""Command: certify the edit, of a model in every mode or of files on disk.

    python -m kernel_surgery.verify --model SRC --subspace S [--baked DST] [--out certificate.json]
    python -m kernel_surgery.verify --model SRC --subspace S --engine vllm [--baked DST] [--out certificate.json]
    python -m kernel_surgery.verify --baked DST [--model SRC]
    python -m kernel_surgery.verify --adapter DIR [--model SRC]
    python -m kernel_surgery.verify --restored DIR [--model SRC]

The first form checks a model (`certify.model`). It compares hook, fused, baked and lora with the exact edit and with
each other, layer by layer and end to end. With --engine vllm it compares the log probabilities that vLLM gives
in every mode with the exact edit's (`certify.engine`). The other forms check files (`certify.files`). With SRC, every
edited element is checked against its error bound.

Exit status: 0 if everything holds; 1 if a check fails, with the layer named; 2 for input that cannot be verified.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, add_overwrite, check_finite_strength, command_line, main
from kernel_surgery.common.ending import Following, Word, look_at, next_command, quoted, read_it, strength_words, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import DTYPES
from kernel_surgery.common.progress import waiting


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    description = "Check that an edit was made exactly: in a model in every mode, a baked checkpoint or an adapter."
    p = Parser("verify", description=description)
    more = 'the original model: "polyglot" (the embedded model), a folder, or a Hugging Face id'
    p.add_argument("--model", help=more)
    p.add_argument("--subspace", type=Path, help="subspace file (default with --model polyglot: its own)")
    p.add_argument("--baked", type=Path, help="check this checkpoint from kernel_surgery.bake")
    p.add_argument("--adapter", type=Path, help="check this adapter from kernel_surgery.lora")
    p.add_argument("--restored", type=Path, help="check this checkpoint from kernel_surgery.bake --undo")
    more = "JSON file for the certificate; beside it go its page (.html) and its plot (.svg)"
    p.add_argument("--out", type=Path, help=more)
    p.add_argument("--strength", type=float, help="strength of the edit (default: that of --baked, or 1)")
    p.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: the dtype of the files")
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    p.add_argument("--prompts", type=int, default=8, help="number of prompts (default 8)")
    more = "tokens generated after each prompt (default 16); each one reads the model's files once"
    p.add_argument("--new-tokens", type=int, default=16, help=more)
    more = "also load the whole model, edit all layers at once and decode (default: if it takes at most 2 GB)"
    p.add_argument("--whole", action="store_true", default=None, help=more)
    more = "certify what vLLM runs, in this process, instead of transformers"
    p.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help=more)
    p.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="devices of --engine vllm (default 1)")
    p.add_argument("--engine-args", metavar="JSON", help='more arguments of vllm.LLM, such as {"enforce_eager": true}')
    p.add_argument("--seed", type=int, default=0, help="selects the prompts (default 0)")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown origin or of another model")
    add_overwrite(p)
    return p


def check(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Check options that depend on each other.

    folders: {name: folder} of --baked, --adapter and --restored, if given. Raises UserError.
    """
    if not folders and args.model is None:
        raise UserError("nothing to verify: give --model, --baked, --adapter or --restored.")
    if len(folders) > 1:
        raise UserError(f"--{' and --'.join(folders)} cannot be combined: give one of them.")
    for folder in folders.values():
        if not folder.is_dir():
            fetch = "Fetch a repository of the hub first: hf download ORG/NAME --local-dir DIR"
            raise UserError(f"no folder at {str(folder)!r}. {fetch}")
    for name, least, most in (("prompts", 1, 256), ("new_tokens", 0, 1024)):
        if not least <= getattr(args, name) <= most:
            value = getattr(args, name)
            raise UserError(f"--{name.replace('_', '-')} must be at least {least} and at most {most}, got {value}.")
    check_finite_strength(args.strength)
    if args.engine == "vllm" and (args.model is None or args.whole or {"adapter", "restored"} & folders.keys()):
        raise UserError("--engine vllm needs --model and --subspace, and takes no --adapter, --restored or --whole.")
    if args.engine != "vllm" and (args.tensor_parallel != 1 or args.engine_args):
        raise UserError("--tensor-parallel and --engine-args are for --engine vllm.")
    if args.tensor_parallel < 1:
        raise UserError(f"--tensor-parallel must be at least 1, got {args.tensor_parallel}.")
    if args.subspace is None and not folders and args.model != "polyglot":
        raise UserError(f"--model {args.model} needs --subspace (from kernel_surgery.fit), or --baked.")
    if args.out is not None and args.out.suffix in (".svg", ".html"):
        what = {".svg": "plot", ".html": "page"}[args.out.suffix]
        raise UserError(f"--out {str(args.out)!r} is where the {what} would go: name the JSON file.")
    if args.out is not None:
        for file in (args.out, args.out.with_suffix(".svg"), args.out.with_suffix(".html")):
            check_output(file, overwrite=args.overwrite)


def run(argv: list[str] | None = None) -> int:
    """Print the certificate. Return 1 if a check fails, else 0. Raises UserError for unusable options."""
    args = parser().parse_args(argv)
    folders = {name: getattr(args, name) for name in ("baked", "adapter", "restored") if getattr(args, name)}
    check(args, folders)

    with waiting("starting"):
        from kernel_surgery.certify.engine import verify_engine
        from kernel_surgery.certify.files import verify_adapter, verify_checkpoint, verify_restored
        from kernel_surgery.certify.page import write
        from kernel_surgery.certify.render import shown
        from kernel_surgery.certify.whole import verify_model
        from kernel_surgery.checkpoint.record import read_provenance
        from kernel_surgery.checkpoint.source import refuse_baked
        from kernel_surgery.common.environment import now
        from kernel_surgery.common.names import PROVENANCE
        from kernel_surgery.engines.texts import parse_arguments
        from kernel_surgery.files.hashing import sha256
        from kernel_surgery.models.load import POLYGLOT_SUBSPACE, findable, local_folder, public_name, resolve_model
        from kernel_surgery.models.threads import choose_threads

    subspace = args.subspace
    if subspace is None and args.model == "polyglot" and (not folders or args.engine == "vllm"):
        subspace = POLYGLOT_SUBSPACE
    source = None if args.model is None else local_folder(resolve_model(args.model))
    if source is not None:
        refuse_baked(source, "An edit is compared with what it was made of.")
    damage = "damage: not measured here: a certificate says how exactly an edit was made, eval what it did to the model"
    for kind, folder in folders.items():
        record = read_provenance(folder, kind)
        if kind == "restored":
            damage = ""
        elif (words := record.get("damage", {}).get("in_words")) is not None:
            damage = f"as the folder records it, not measured here: {words}"
        recorded_strength = float(record["strength"])
        if args.strength not in (None, recorded_strength):
            raise UserError(
                f"{str(folder)!r} was made at strength {recorded_strength:g}, not {args.strength:g}. Omit --strength."
            )
    if args.model is not None:
        choose_threads(args.model)
    if args.adapter is not None:
        certificate = verify_adapter(args.adapter, source, subspace)
    elif args.restored is not None:
        certificate = verify_restored(args.restored, source, subspace)
    elif source is not None and subspace is not None:
        names = ("baked", "strength", "dtype", "device", "prompts", "new_tokens", "seed", "force")
        options = {name: getattr(args, name) for name in names} | {"model_id": public_name(args.model)}
        if args.engine == "vllm":
            options |= {"tensor_parallel": args.tensor_parallel, "more": parse_arguments(args.engine_args)}
            certificate = verify_engine(source, subspace, **options)
        else:
            certificate = verify_model(source, subspace, whole=args.whole, **options)
    else:
        certificate = verify_checkpoint(args.baked, source, subspace)
    certificate = ({"damage_in_words": damage} if damage else {}) | certificate
    certificate["command"] = command_line("verify", argv)
    # What ties it to what was certified.
    tied = [("record_sha256", folder / PROVENANCE) for folder in folders.values()]
    tied += [("subspace_sha256", subspace)] if subspace else []
    certificate["of"] |= {name: sha256(file) for name, file in tied}
    certificate["environment"] |= {"date": now()}
    if args.out:
        with waiting("drawing the page"):
            write(args.out, certificate)
    if damage:
        print(damage)
    print(shown(certificate))
    if args.out:
        for suffix in (args.out.suffix, ".svg", ".html"):
            wrote(args.out.with_suffix(suffix))
        read_it(args.out.with_suffix(".html"))
    if certificate["faults"]:
        faults = 'the lines above that begin with "fault:"'
        look_at(faults + (f', also in "faults" of {quoted(args.out)}' if args.out else ""))
        return 1
    next_command(_following(args, folders, subspace, findable(certificate.get("model_id"))))
    return 0


def _following(
    args: argparse.Namespace, folders: dict[str, Path], subspace: Path | None, found: str | None
) -> Following:
    """Return the command that comes after a certificate that holds.

    subspace: the file that was used. found: the model that the certificate names, if --model finds it by that name.
    """
    model = args.model or found
    named: list[Word] = ["--model", model or "DIR"]
    note = "" if model else "DIR is the folder of the original model."
    if "restored" in folders:
        if args.model is None:
            note = f"Only hashes were checked. With the original, every number is. {note}".rstrip()
            return Following("verify", ["--restored", args.restored, *named], note)
        return Following("eval", ["--mode", "original", "--model", args.restored])
    if "adapter" in folders and args.model is None:
        note = f"With the original, A is checked too. {note}".rstrip()
        return Following("verify", ["--adapter", args.adapter, *named], note)
    words: list[Word] = [word for kind, folder in folders.items() for word in (f"--{kind}", folder)]
    if not words:
        assert subspace is not None  # of what was certified
        words = ["--mode", "fused", "--subspace", subspace]
        words += [] if args.strength is None else strength_words(args.strength)
        words += ["--force"] if args.force else []
    words += ["--certificate", args.out] if args.out else []
    words += ["--engine", "vllm"] if args.engine == "vllm" else []
    return Following("eval", [*named, *words], note)


if __name__ == "__main__":
    main(run)
