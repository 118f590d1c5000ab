"""Fit a language subspace to activations.

The methods "deviations" and "centroids" are an exact PCA of the differences between languages, and give an orthogonal
edit. "leace" and "oblique" give the edit that changes the activations least (`subspace.erasing`).
"""

import torch
from einops import einsum, rearrange, reduce

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import ERASING, METHOD, METHODS, RANK
from kernel_surgery.common.progress import progress
from kernel_surgery.models.chat import Chat
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.activations import Activations
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.erasing import SHRINKAGE, erasing_edit
from kernel_surgery.subspace.moments import LanguageMoments, moments_of

# Of the activations' provenance, what the subspace keeps beside its own fields.
_COPIED: tuple[str, ...] = ("split", "problems", "seed", "dtype", "first_token", "tokens", "environment")
_COPIED += (*Chat(True).record(), "forms", "problems_file", "problems_sha256")


def language_rows(x: torch.Tensor, method: str) -> torch.Tensor:
    """Return rows with the same singular values and right singular vectors as the deviations between languages.

    x: [problems, languages, d_model]. Returns [rows, d_model] float64.
    method: "deviations" (every problem minus its mean over languages) or "centroids" (the languages' means).

    The deviations D of one problem sum to zero. So languages - 1 orthonormal Helmert contrasts H hold them exactly:
    D^T D = (Hx)^T (Hx). Raises SubspaceError for another method.
    """
    from scipy.linalg import helmert

    if method in ERASING or method not in METHODS:
        known = ", ".join(name for name in METHODS if name not in ERASING)
        raise SubspaceError(f"unknown method {method!r}; known: {known}")
    x = x.double()
    if method == "centroids":
        x = reduce(x, "problem language d_model -> 1 language d_model", "mean")
    contrasts = torch.from_numpy(helmert(x.shape[1])).to(x.device)
    rows = einsum(contrasts, x, "contrast language, problem language d_model -> problem contrast d_model")
    return rearrange(rows, "problem contrast d_model -> (problem contrast) d_model")


def principal_basis(rows: torch.Tensor, rank: int, what: str = "the data") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first right singular vectors of rows [n, d_model], and all singular values.

    Returns (basis [d_model, rank] float32, singular values float32). The largest entry of each basis vector is
    positive, so equal data give equal files.

    Numerics: float64 eigenvectors of the smaller Gram matrix, several times faster than a full SVD
    (`python -m bench.fit`). Squaring loses nothing that float32 activations hold: singular values are resolved down to
    s_1 sqrt(n 2^-52), far below the smallest one that counts.

    Raises SubspaceError if `rank` exceeds the numerical rank. Singular values below s_1 * max(n, d_model) * 2^-24 are
    rounding of the float32 activations, and their vectors are arbitrary.
    """
    rows = rows.double()
    tall = rows.shape[0] > rows.shape[1]
    values, vectors = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    s, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    available = int((s > s[0] * max(rows.shape) * 2.0**-24).sum()) if len(s) else 0
    if not available:
        raise _alike(what)
    if not 1 <= rank <= available:
        raise SubspaceError(
            f"cannot fit rank {rank} at {what}: its {rows.shape[0]} rows of data span {available} dimensions.\n"
            f"Choose --rank 1 to {available}, or collect more problems or languages."
        )
    basis = vectors[:, :rank]
    if not tall:
        # X^T v = s u is orthogonal up to float64 rounding times s_1 / s_k. Gram-Schmidt, strongest first, corrects it.
        basis = torch.linalg.qr(rows.T @ basis)[0]
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return (basis * signs).float().contiguous(), s.float()


def _alike(what: str) -> SubspaceError:
    return SubspaceError(
        f"there is no subspace to fit at {what}: the activations do not differ between languages.\n"
        "Were they measured on prompts in several languages? Collect again."
    )


def fit_subspace(
    activations: Activations | LanguageMoments,
    rank: int | None = None,
    *,
    method: str = METHOD,
    layers: list[int] | None = None,
    shrinkage: float | None = SHRINKAGE,
    command: str | None = None,
) -> Subspace:
    """Fit the language subspace of `activations`.

    activations: one vector per prompt, or the moments of many; those have no pairs of prompts, so "deviations" cannot
    use them.
    rank: k, the number of directions per layer. By default 10, or with "leace" and "oblique" as many as there are.
    method: "oblique" or "leace" (`subspace.erasing`), "deviations" or "centroids" (`language_rows`).
    layers: the layers to fit (default: all that were collected).
    shrinkage: of the covariance, for "leace" and "oblique"; None estimates it (`subspace.erasing.oas_shrinkage`).
    command: the command line, for the record.

    Numerics: float64; the edits are stored in float32. Raises SubspaceError for layers that were not collected, a rank
    beyond the data's, an unknown method, and moments with method "deviations".
    """
    if method not in METHODS:
        raise SubspaceError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    layers = list(activations.layers) if layers is None else list(layers)
    if missing := [layer for layer in layers if layer not in activations.layers]:
        raise SubspaceError(
            f"layers {missing} were not collected: the activations hold {list(activations.layers)}.\n"
            "Choose --layers from these, or collect again."
        )
    edits, means, spectra = {}, {}, {}
    for layer in progress(layers, total=len(layers), desc="fit"):
        edits[layer], spectra[layer], means[layer] = _fit_layer(activations, layer, method, rank, shrinkage)
    found, first = activations.provenance, edits[layers[0]]
    return Subspace.of(
        edits,
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
            "rank": first.basis.shape[1],
            "languages": list(activations.languages),
            "command": command,
            **({"shrinkage": "oas" if shrinkage is None else shrinkage} if method in ERASING else {}),
            **{k: found[k] for k in _COPIED if k in found},
        },
    )


def _fit_layer(
    activations: Activations | LanguageMoments, layer: int, method: str, rank: int | None, shrinkage: float | None
) -> tuple[Projection, torch.Tensor, torch.Tensor]:
    """Return the edit of one layer, its singular values [n] float32 and the mean activation [d_model] float32."""
    what = f"layer {layer}"
    if method in ERASING:
        if isinstance(activations, LanguageMoments):
            moments = activations.by_layer[layer]
        else:
            moments = moments_of([activations.vectors[lang][layer] for lang in activations.languages])
        edit, singular = erasing_edit(moments, rank, affine=method == "leace", shrinkage=shrinkage, what=what)
        return edit, singular.float(), moments.mean.float()
    if isinstance(activations, LanguageMoments):
        if method == "deviations":
            raise SubspaceError(
                "the activations are moments over tokens, which have no pairs of prompts: --method deviations cannot "
                "use them.\nChoose another --method, or collect with --pool last or mean."
            )
        x = activations.by_layer[layer].means[None]
    else:
        x = torch.stack([activations.vectors[lang][layer] for lang in activations.languages], dim=1)
    rows = language_rows(x, method)
    # Equal activations, each rounded to float32, differ by this much at most in an orthonormal contrast.
    rounding = x.shape[1] ** 0.5 * 2.0**-24 * x.abs().max()
    if not bool((rows.abs() > rounding).any()):
        raise _alike(what)
    basis, spectrum = principal_basis(rows, RANK if rank is None else rank, what)
    return Projection(basis), spectrum, x.double().mean((0, 1)).float()
