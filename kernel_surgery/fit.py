"""Command: fit a language subspace to collected activations.

    python -m kernel_surgery.fit --activations F --out subspace.safetensors

Four methods, for each layer, with x[p, l] the activation of problem p in language l:

    oblique      (default) the linear map that makes the languages' means equal and changes the activations least in
                 mean square. It has a dual basis and no offset, so every mode and engine can make it.
    leace        LEACE: the affine map that does the same. It has an offset too.
    deviations   the right singular vectors of x[p, l] - mean over l of x[p, l]. Only the language changes between the
                 prompts of one problem, so the mathematics drops out. The reference script that this project began with
                 used this method. It needs `collect --pool last` or `mean`, and breaks real models (docs/real.md).
    centroids    the same for the mean vectors of the languages. It has at most (languages - 1) dimensions and is less
                 noisy.

`--sequential --model M` needs no activations. It fits leace or oblique edits layer by layer, each on the model with the
edits before it, in one pass over the problems with one decoder layer in memory. Killed, it goes on at its layer.

With the last two, the k leading right singular vectors are the basis U [d_model, k] of an orthogonal edit. They are
computed in float64 and stored in float32.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery.common.command import Parser, add_chat, add_overwrite, add_problems, main, untouched
from kernel_surgery.common.ending import Following, Word, free, next_command, wrote
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import BATCH_TOKENS, DTYPES, ERASING, LANGUAGES, METHOD, METHODS, SPLITS
from kernel_surgery.common.progress import waiting

if TYPE_CHECKING:
    from kernel_surgery.subspace.artifact import Subspace


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("fit", description="Fit a language subspace to collected activations.")
    more = "file from kernel_surgery.collect, or an .npz with [problems, d_model] arrays such as en_L9"
    p.add_argument("--activations", type=Path, help=more)
    p.add_argument("--out", type=Path, required=True, help="subspace file to write (safetensors)")
    more = "dimensions of the subspace (default: one less than there are languages; deviations, centroids: 10)"
    p.add_argument("--rank", type=int, help=more)
    more = "oblique (default), leace: what the languages' means tell, removed with least change; deviations: all "
    more += "differences between languages; centroids: those of their means"
    p.add_argument("--method", choices=METHODS, help=more)
    more = "of the covariance, 0 to 1, for leace and oblique (default 0.01); auto estimates it"
    p.add_argument("--shrinkage", help=more)
    p.add_argument("--layers", help='such as "9-26" (default: the middle half of the model)')
    p.add_argument("--model-id", help="model that an .npz was measured on")
    p.add_argument("--site", help="where an .npz was measured: mlp_out or resid_post")
    add_overwrite(p)
    _add_sequential(p)
    return p


def _add_sequential(p: argparse.ArgumentParser) -> None:
    """Add the options that belong to --sequential: it reads the problems itself."""
    group = p.add_argument_group("layer by layer, instead of --activations")
    more = "fit each layer on the model with the edits before it; leace or oblique"
    group.add_argument("--sequential", action="store_true", help=more)
    group.add_argument("--model", help='"polyglot" (the embedded model), a folder, or a Hugging Face id')
    more = f"comma-separated, or all: {','.join(LANGUAGES)}, or what a file of --problems is in (default: all)"
    group.add_argument("--languages", default="all", help=more)
    group.add_argument("--split", choices=SPLITS, default="fit", help="which problems (default: fit); eval uses test")
    add_problems(group, "default 40")
    add_chat(group)
    group.add_argument("--seed", type=int, default=0, help="selects the problems from the split (default 0)")
    group.add_argument("--keep-first", action="store_true", help="count the first token of every prompt too")
    more = f"tokens in one forward pass (default {BATCH_TOKENS})"
    group.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help=more)
    more = "auto (default): float32 on a CPU, bfloat16 on a GPU"
    group.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help=more)
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    group.add_argument("--restart", action="store_true", help="begin again instead of going on with a killed fit")


@untouched("No file was written.")
def run(argv: list[str] | None = None) -> int:
    """Fit, print the captured variance per layer, and save. Return 0.

    Raises what `subspace.activations.load_activations` and `subspace.fitting.fit_subspace` raise.
    """
    args = parser().parse_args(argv)
    check_output(args.out, overwrite=args.overwrite)
    if args.sequential:
        return _sequential(args)
    if args.activations is None:
        raise UserError(
            "--activations is missing: the file from python -m kernel_surgery.collect. Or give --sequential --model M."
        )
    if args.model is not None:
        raise UserError("--model is for --sequential. --activations say which model they were measured on.")
    args.method = args.method or METHOD

    with waiting("starting"):
        from kernel_surgery.models.architectures import default_layers, parse_layers
        from kernel_surgery.subspace.activations import Activations, load_activations
        from kernel_surgery.subspace.describing import variance_captured
        from kernel_surgery.subspace.fitting import fit_subspace
        from kernel_surgery.subspace.moments import LanguageMoments, holds_moments, load_moments

    shrinkage = parse_shrinkage(args.shrinkage, args.method)
    activations: Activations | LanguageMoments
    if holds_moments(args.activations):
        activations = load_moments(args.activations)
    else:
        activations = load_activations(args.activations, args.model_id, args.site)
    n_layers = activations.provenance.get("n_layers") or max(activations.layers) + 1
    layers = parse_layers(args.layers, n_layers) if args.layers else default_layers(n_layers)
    options = {"method": args.method, "layers": list(layers), "shrinkage": shrinkage, "command": _command(args)}
    subspace = fit_subspace(activations, args.rank, **options)
    shares = {layer: variance_captured(subspace.spectrum[layer], subspace.rank) for layer in subspace.layers}
    # At full rank an erasing edit holds all, by construction.
    if args.method not in ERASING or min(shares.values()) < 0.9995:
        for layer, captured in shares.items():
            print(f"  L{layer}: lang variance captured = {captured:.3f}")
    subspace.save(args.out)
    _end(args.out, subspace, None)
    return 0


def _command(args: argparse.Namespace) -> str:
    """Return the options that shape the fit, for the record."""
    rank = f"--rank {args.rank} " if args.rank else ""
    sequential = "--sequential " if args.sequential else ""
    shrinkage = f" --shrinkage {args.shrinkage}" if args.shrinkage else ""
    return f"fit {sequential}{rank}--method {args.method} --layers {args.layers or 'middle half'}{shrinkage}"


def _end(out: Path, subspace: "Subspace", model: str | None) -> None:
    """Say what was fitted and written, and how to see what the edit does. model: as given to --model, if it was."""
    from kernel_surgery.models.load import findable
    from kernel_surgery.subspace.describing import described, few_tokens

    print(*described(subspace)[:-1], sep="\n")
    if note := few_tokens(subspace):
        print(note)
    wrote(out)
    place = model or findable(subspace.model_id)
    note = "" if place else f"DIR is the folder of {subspace.model_id or 'the model that was measured'}."
    # Only with its fingerprint is a subspace known to belong to the model.
    force = [] if subspace.fingerprint else ["--force"]
    edit: list[Word] = ["--model", place or "DIR", "--subspace", out, *force]
    fit = subspace.fit or {}
    if set(fit.get("languages") or ()) <= set(LANGUAGES):
        next_command(Following("eval", ["--mode", "fused", *edit], note))
        return
    # Answers are judged in no other languages.
    file = Path(str(fit.get("problems_file", "FILE")))
    if "*" in file.name:  # several, of which the record has no folder
        file, note = Path("PROBLEMS"), f"{note} PROBLEMS is the folder of {file}.".strip()
    next_command(Following("probe", [*edit, "--problems", file, "--out", free(Path("probe"))], note))


def _sequential(args: argparse.Namespace) -> int:
    """Fit layer by layer, print what is left at each layer, and save. Return 0."""
    if args.model is None:
        raise UserError("--sequential needs --model: it runs the model itself.")
    if args.activations is not None:
        raise UserError("--sequential measures its own activations: leave out --activations.")
    args.method = args.method or METHOD
    if args.method not in ERASING:
        raise UserError(f"--sequential is for --method {' and '.join(ERASING)}, not {args.method}.")
    if args.batch_tokens < 1:
        raise UserError(f"--batch-tokens must be at least 1, got {args.batch_tokens}.")

    with waiting("starting"):
        from kernel_surgery.files.problems import problem_source
        from kernel_surgery.models.architectures import default_layers, parse_layers
        from kernel_surgery.models.before import check_config, check_stored
        from kernel_surgery.models.chat import choose_chat
        from kernel_surgery.models.layerwise import Layerwise
        from kernel_surgery.models.load import (
            load_tokenizer,
            local_folder,
            parse_device,
            parse_dtype,
            public_name,
            resolve_model,
        )
        from kernel_surgery.models.threads import choose_threads
        from kernel_surgery.subspace.partial import partial_folder, resuming
        from kernel_surgery.subspace.sequential import fit_sequentially

    asked = problem_source(args.problems, seed=args.seed)
    shrinkage, languages = parse_shrinkage(args.shrinkage, args.method), asked.languages(args.languages, judged=False)
    if len(languages) < 2:
        raise UserError("a language subspace needs at least two languages; --languages names one.")
    chosen, device = asked.split(args.split), parse_device(args.device)
    choose_threads(args.model)
    chat = choose_chat(args.model, args.chat, thinking=args.thinking)
    source = local_folder(resolve_model(args.model))
    config = check_config(source)
    check_stored(source)
    n_layers = config["num_hidden_layers"]
    layers = parse_layers(args.layers, n_layers) if args.layers else default_layers(n_layers)
    tokenizer = load_tokenizer(str(source))
    reader = Layerwise(source, parse_dtype(args.dtype, device), device)
    about = {"model_id": public_name(args.model), "split": args.split, "seed": args.seed, "command": _command(args)}
    about |= asked.record
    options = {"method": args.method, "rank": args.rank, "shrinkage": shrinkage, "keep_first": args.keep_first}
    say = partial(print, file=sys.stderr)
    with resuming(partial_folder(args.out), restart=args.restart, say=say) as kept:
        subspace = fit_sequentially(
            *(reader, tokenizer, chosen, languages, list(layers)),
            **{**options, "batch_tokens": args.batch_tokens, "about": about, "partial": kept, "chat": chat},
        )
        kept.publish(subspace.save, args.out)
    for layer, left in (subspace.fit or {})["sequential"].items():
        print(f"  L{layer}: covariance with the language label left = {left:.1e}")
    count = sum((subspace.fit or {})["tokens"].values())
    if note := asked.note(args.split):
        print(note)
    print(f"of {count} fitting tokens; another text, another layer or a probe may still tell the language")
    _end(args.out, subspace, args.model)
    return 0


def parse_shrinkage(text: str | None, method: str) -> float | None:
    """Return the shrinkage of an option: a number from 0 to 1, or None for "auto". Raises UserError."""
    from kernel_surgery.subspace.erasing import SHRINKAGE

    if text is None:
        return SHRINKAGE
    if method not in ERASING:
        raise UserError(f"--shrinkage is for --method {' and '.join(ERASING)}, not {method}.")
    try:
        number = None if text == "auto" else float(text)
    except ValueError as error:
        raise UserError(f"--shrinkage must be a number from 0 to 1 or auto, got {text!r}.") from error
    if number is not None and not 0 <= number <= 1:
        raise UserError(f"--shrinkage must be from 0 to 1, got {text}.")
    return number


if __name__ == "__main__":
    main(run)
