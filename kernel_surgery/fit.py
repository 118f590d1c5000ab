"""From activations to a language subspace: python -m kernel_surgery.fit --activations F --out subspace.safetensors

Per layer, with x[p, l] the activation of problem p in language l:

    deviations   the right singular vectors of x[p, l] - mean over l of x[p, l]: what changes when only the language
                 does. The mathematics of a problem is common to its seven prompts and drops out. (The reference
                 script's way.)
    centroids    the same of the languages' mean vectors: at most (languages - 1) dimensions, less noisy.

The k leading right singular vectors are the basis U [d_model, k]. Computed in float64, stored in float32.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli

if TYPE_CHECKING:
    import torch

    from kernel_surgery.collect import Activations
    from kernel_surgery.subspace import Subspace

METHODS = ("deviations", "centroids")
_KEY = re.compile(r"([a-z]{2,3})_L(\d+)")


def load_activations(path: Path, model_id: str | None = None, site: str | None = None) -> "Activations":
    """Our safetensors file, or the reference script's .npz (keys "{lang}_L{layer}"), which is never unpickled.

    `model_id` and `site` say what an .npz cannot. Raises ValueError, naming the file and the entry, for a file that
    is neither, that needs pickle, that holds other keys, ragged shapes, or numbers that are not finite.
    """
    import zipfile

    import numpy as np
    import torch
    from safetensors import SafetensorError, safe_open

    from kernel_surgery.collect import SITES, Activations

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no activations at {str(path)!r}. Make them with python -m kernel_surgery.collect.")
    if site is not None and site not in SITES:
        raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    provenance: dict = {}
    arrays: dict[str, torch.Tensor] = {}
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {key: torch.from_numpy(np.asarray(data[key], dtype=np.float32)) for key in data.files}
        # numpy raises whatever its parser meets: EOFError for an empty file, TypeError for a .npy under this name.
        except (ValueError, OSError, EOFError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as error:
            if "pickle" in str(error).lower():
                raise ValueError(
                    f"{str(path)!r} holds pickled objects, which are never loaded: they can run code.\n"
                    "Save plain float32 arrays: np.savez(path, **{f'{lang}_L{i}': np.asarray(x, np.float32)})."
                ) from error
            raise ValueError(f"{str(path)!r} is not a readable .npz file ({error}).") from error
    else:
        import json

        try:
            with safe_open(path, "pt") as file:
                arrays = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} is neither a safetensors file of activations nor an .npz ({error})."
            ) from error
    for name, given in (("model_id", model_id), ("site", site)):
        if given and provenance.get(name, given) != given:
            raise ValueError(
                f"{str(path)!r} was measured with {name} {provenance[name]!r}, not {given!r}. Leave the option out."
            )
        if given:
            provenance[name] = given
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if not match or array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                f"{str(path)!r} has an entry {key!r} of shape {tuple(array.shape)}; expected [problems, d_model] "
                'arrays named "{lang}_L{layer}", such as "en_L9".'
            )
        if not torch.isfinite(array).all():
            raise ValueError(f"{str(path)!r}: {key} holds NaN or Inf. Collect again, in float32 or bfloat16.")
        vectors.setdefault(match[1], {})[int(match[2])] = array
    shapes = {f"{lang}_L{i}": tuple(a.shape) for lang, by in vectors.items() for i, a in by.items()}
    if len(vectors) < 2:
        raise ValueError(f"{str(path)!r} holds {len(vectors)} languages; a language subspace needs at least two.")
    if len(set(shapes.values())) > 1 or len({tuple(sorted(by)) for by in vectors.values()}) > 1:
        first = next(iter(shapes))
        other = next((key for key in shapes if shapes[key] != shapes[first]), "a language with other layers")
        raise ValueError(
            f"{str(path)!r} is ragged: {first} is {shapes[first]}, but {other} is {shapes.get(other, 'there')}.\n"
            "Every language needs the same problems at the same layers."
        )
    return Activations(vectors, provenance)


def language_rows(x: "torch.Tensor", method: str) -> "torch.Tensor":
    """Vectors with the singular values and right singular vectors of the deviations (or of the centroids').

    x [problems, languages, d_model]; returned [rows, d_model] float64. Of a problem's deviations from its mean, one is
    minus the sum of the others: languages - 1 orthonormal contrasts (Helmert's) hold them exactly, D^T D = (Hx)^T (Hx).
    """
    import torch
    from einops import einsum, rearrange, reduce
    from scipy.linalg import helmert

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    x = x.double()
    if method == "centroids":
        x = reduce(x, "problem language d_model -> 1 language d_model", "mean")
    contrasts = torch.from_numpy(helmert(x.shape[1])).to(x.device)
    rows = einsum(contrasts, x, "contrast language, problem language d_model -> problem contrast d_model")
    return rearrange(rows, "problem contrast d_model -> (problem contrast) d_model")


def principal_basis(rows: "torch.Tensor", rank: int, what: str = "the data") -> "tuple[torch.Tensor, torch.Tensor]":
    """(basis [d_model, rank] float32, all singular values float32) of rows [n, d_model].

    By the eigenvectors of the smaller Gram matrix in float64, several times faster than a full SVD
    (`python -m bench.fit`). Squaring loses nothing that float32 activations hold: singular values are resolved down to
    s_1 sqrt(n 2^-52), and the rank ends well above that. Each basis vector's largest entry is positive, so that equal
    data give equal files.

    Raises ValueError if `rank` exceeds the numerical rank: singular values below s_1 * max(n, d_model) * 2^-24 are
    rounding of the float32 activations, and vectors that belong to them point anywhere.
    """
    import torch

    rows = rows.double()
    tall = rows.shape[0] > rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    s, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    available = int((s > s[0] * max(rows.shape) * 2.0**-24).sum()) if len(s) else 0
    if not 1 <= rank <= available:
        raise ValueError(
            f"cannot take rank {rank} at {what}: its {rows.shape[0]} rows span {available} dimensions.\n"
            f"No file was written. Ask for --rank 1 to {available}, or collect more problems or languages."
        )
    basis = vectors[:, :rank]
    if not tall:
        # X^T v = s u, orthogonal but for float64's rounding times s_1 / s_k. Gram-Schmidt, strongest first, mends that.
        basis = torch.linalg.qr(rows.T @ basis)[0]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return (basis * signs).float().contiguous(), s.float()


def variance_captured(spectrum: "torch.Tensor", rank: int) -> float:
    """Share of the squared singular values that the first `rank` hold."""
    squares = spectrum.double() ** 2
    return float(squares[:rank].sum() / squares.sum())


def fit(
    activations: "Activations",
    rank: int = 10,
    *,
    method: str = "deviations",
    layers: list[int] | None = None,
    command: str | None = None,
) -> "Subspace":
    """The language subspace of `activations` at `layers` (default: every layer they hold).

    Raises ValueError for layers that were not collected, for a rank beyond the data's, and for an unknown method.
    """
    import torch

    from kernel_surgery.subspace import Subspace

    layers = list(activations.layers) if layers is None else list(layers)
    if missing := [layer for layer in layers if layer not in activations.layers]:
        raise ValueError(
            f"layers {missing} were not collected: the activations hold {list(activations.layers)}.\n"
            "No file was written. Choose --layers among them, or collect again."
        )
    bases, means, spectra = {}, {}, {}
    for layer in cli.progress(layers, total=len(layers), desc="fit"):
        x = torch.stack([activations.vectors[lang][layer] for lang in activations.languages], dim=1)
        bases[layer], spectra[layer] = principal_basis(language_rows(x, method), rank, f"layer {layer}")
        means[layer] = x.double().mean((0, 1)).float()
    found = activations.provenance
    return Subspace(
        bases=bases,
        means=means,
        spectrum=spectra,
        site=found.get("site"),
        pool=found.get("pool"),
        model_id=found.get("model_id"),
        revision=found.get("revision"),
        n_layers=found.get("n_layers"),
        fingerprint=found.get("fingerprint"),
        fit={
            "method": method,
            "rank": rank,
            "languages": list(activations.languages),
            "command": command,
            **{k: found[k] for k in ("split", "problems", "seed", "dtype", "environment") if k in found},
        },
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Fit a language subspace to collected activations.")
    p.add_argument("--activations", type=Path, required=True, help="collect's safetensors, or the script's .npz")
    p.add_argument("--out", type=Path, required=True, help="subspace file to write (safetensors)")
    p.add_argument("--rank", type=int, default=10, help="dimensions of the subspace (default 10)")
    p.add_argument("--method", choices=METHODS, default="deviations")
    p.add_argument("--layers", help='such as "9-26" (default: the middle half of the model)')
    p.add_argument("--model-id", help="the model an .npz was measured on")
    p.add_argument("--site", help="where an .npz was measured: mlp_out or resid_post")
    return p


def run(argv: list[str] | None = None) -> int:
    """Fit, print the variance captured per layer, save."""
    args = parser().parse_args(argv)
    activations = load_activations(args.activations, args.model_id, args.site)

    from kernel_surgery.sites import default_layers, parse_layers

    n_layers = activations.provenance.get("n_layers") or max(activations.layers) + 1
    layers = parse_layers(args.layers, n_layers) if args.layers else default_layers(n_layers)
    command = f"fit --rank {args.rank} --method {args.method} --layers {args.layers or 'middle half'}"
    subspace = fit(activations, args.rank, method=args.method, layers=list(layers), command=command)
    for layer in subspace.layers:
        captured = variance_captured(subspace.spectrum[layer], args.rank)
        print(f"  L{layer}: lang variance captured = {captured:.3f}")
    subspace.save(args.out)
    print(
        f"{args.out}: rank {args.rank}, layers {layers[0]}-{layers[-1]}, "
        f"{subspace.site or 'site not stated'}, {subspace.model_id or 'model not stated'}"
    )
    return 0


if __name__ == "__main__":
    cli.main(run)
