"""Command: fit a language subspace to collected activations.

    python -m kernel_surgery.fit --activations F --out subspace.safetensors

Two methods, for each layer, with x[p, l] the activation of problem p in language l:

    deviations   the right singular vectors of x[p, l] - mean over l of x[p, l]. Only the language changes between the
                 prompts of one problem, so the mathematics drops out. The reference script that this project began with
                 used this method.
    centroids    the same for the mean vectors of the languages. It has at most (languages - 1) dimensions and is less
                 noisy.

The k leading right singular vectors are the basis U [d_model, k]. They are computed in float64 and stored in float32.
"""

import argparse
from pathlib import Path

from kernel_surgery.common.command import Parser, add_overwrite, main, untouched
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import METHODS


def parser() -> argparse.ArgumentParser:
    """Return the command line parser."""
    p = Parser("fit", description="Fit a language subspace to collected activations.")
    more = "file from kernel_surgery.collect, or an .npz with [problems, d_model] arrays such as en_L9"
    p.add_argument("--activations", type=Path, required=True, help=more)
    p.add_argument("--out", type=Path, required=True, help="subspace file to write (safetensors)")
    p.add_argument("--rank", type=int, default=10, help="dimensions of the subspace (default 10)")
    more = "deviations (default): all differences between languages; centroids: only those of their means"
    p.add_argument("--method", choices=METHODS, default="deviations", help=more)
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
    from kernel_surgery.subspace.activations import load_activations
    from kernel_surgery.subspace.fitting import fit_subspace, variance_captured

    activations = load_activations(args.activations, args.model_id, args.site)
    n_layers = activations.provenance.get("n_layers") or max(activations.layers) + 1
    layers = parse_layers(args.layers, n_layers) if args.layers else default_layers(n_layers)
    command = f"fit --rank {args.rank} --method {args.method} --layers {args.layers or 'middle half'}"
    subspace = fit_subspace(activations, args.rank, method=args.method, layers=list(layers), command=command)
    for layer in subspace.layers:
        captured = variance_captured(subspace.spectrum[layer], args.rank)
        print(f"  L{layer}: lang variance captured = {captured:.3f}")
    subspace.save(args.out)
    print(
        f"{args.out}: rank {args.rank}, layers {layers[0]}-{layers[-1]}, "
        f"site {subspace.site or 'not stated'}, model {subspace.model_id or 'not stated'}"
    )
    return 0


if __name__ == "__main__":
    main(run)
