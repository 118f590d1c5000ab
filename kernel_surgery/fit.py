"""Command: fit a language subspace to collected activations.

    python -m kernel_surgery.fit --activations F --out subspace.safetensors

Four methods, for each layer, with x[p, l] the activation of problem p in language l:

    deviations   the right singular vectors of x[p, l] - mean over l of x[p, l]. Only the language changes between the
                 prompts of one problem, so the mathematics drops out. The reference script that this project began with
                 used this method.
    centroids    the same for the mean vectors of the languages. It has at most (languages - 1) dimensions and is less
                 noisy.
    leace        LEACE: the affine map that makes the languages' means equal and changes the activations least. It has a
                 dual basis and an offset.
    oblique      the linear map that does the same. It has no offset, so every mode and engine can make it.

With the first two, the k leading right singular vectors are the basis U [d_model, k] of an orthogonal edit. They are
computed in float64 and stored in float32. The last two also take the moments that `collect --pool tokens` writes.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, add_overwrite, main, untouched
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import ERASING, METHODS


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("fit", description="Fit a language subspace to collected activations.")
    more = "file from kernel_surgery.collect, or an .npz with [problems, d_model] arrays such as en_L9"
    p.add_argument("--activations", type=Path, required=True, help=more)
    p.add_argument("--out", type=Path, required=True, help="subspace file to write (safetensors)")
    more = "dimensions of the subspace (default 10; leace and oblique: one less than there are languages)"
    p.add_argument("--rank", type=int, help=more)
    more = "deviations (default): all differences between languages; centroids: those of their means; leace, oblique: "
    more += "what the means tell, removed with least change"
    p.add_argument("--method", choices=METHODS, default="deviations", help=more)
    more = "of the covariance, 0 to 1, for leace and oblique (default 0.01); auto estimates it"
    p.add_argument("--shrinkage", help=more)
    p.add_argument("--layers", help='such as "9-26" (default: the middle half of the model)')
    p.add_argument("--model-id", help="model that an .npz was measured on")
    p.add_argument("--site", help="where an .npz was measured: mlp_out or resid_post")
    add_overwrite(p)
    return p


@untouched("No file was written.")
def run(argv: list[str] | None = None) -> int:
    """Fit, print the captured variance per layer, and save. Return 0.

    Raises what `subspace.activations.load_activations` and `subspace.fitting.fit_subspace` raise.
    """
    args = parser().parse_args(argv)
    check_output(args.out, overwrite=args.overwrite)

    from kernel_surgery.models.architectures import default_layers, parse_layers
    from kernel_surgery.subspace.activations import Activations, load_activations
    from kernel_surgery.subspace.collecting import recorded
    from kernel_surgery.subspace.fitting import fit_subspace, variance_captured
    from kernel_surgery.subspace.moments import LanguageMoments, holds_moments, load_moments

    shrinkage = parse_shrinkage(args.shrinkage, args.method)
    activations: Activations | LanguageMoments
    if holds_moments(args.activations):
        activations = load_moments(args.activations)
    else:
        activations = load_activations(args.activations, args.model_id, args.site)
    n_layers = activations.provenance.get("n_layers") or max(activations.layers) + 1
    layers = parse_layers(args.layers, n_layers) if args.layers else default_layers(n_layers)
    rank = f"--rank {args.rank} " if args.rank else ""
    command = f"fit {rank}--method {args.method} --layers {args.layers or 'middle half'}"
    command += f" --shrinkage {args.shrinkage}" if args.shrinkage else ""
    options = {"method": args.method, "layers": list(layers), "shrinkage": shrinkage, "command": command}
    subspace = recorded(fit_subspace(activations, args.rank, **options), activations.provenance)
    for layer in subspace.layers:
        captured = variance_captured(subspace.spectrum[layer], subspace.rank)
        print(f"  L{layer}: lang variance captured = {captured:.3f}")
    subspace.save(args.out)
    print(
        f"{args.out}: rank {subspace.rank}, {subspace.form}, layers {layers[0]}-{layers[-1]}, "
        f"site {subspace.site or 'not stated'}, model {subspace.model_id or 'not stated'}"
    )
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
