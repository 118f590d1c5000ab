"""Fit an oblique edit: the smallest change after which the languages' means no longer differ.

LEACE (Belrose et al. 2023, arXiv:2306.03819) is the affine map y = x - A (B^T x - c) that removes the covariance of x
with the language label and changes x least in mean square. With S = cov(x), W = S^(-1/2), and Q the left singular
vectors of W cov(x, label): A = S^(1/2) Q, B = S^(-1/2) Q, c = B^T E x.

`oblique` is the linear map that does the same: c = 0, and E x x^T stands for S. It is exact in every mode and engine,
because it needs no bias.

Such an edit removes what the *means* of the fitting data tell of the language, layer by layer. That is less than
"the language": a probe may find it in other text, in other layers, or in more than the means.
"""

import torch
from torch import Tensor

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.moments import Moments

# Share of the mean variance that is added to every direction before the root is taken. Measured on SmolLM2-135M: .01
# does less damage than 1e-4 at the same rank, because directions of little variance are estimated badly.
SHRINKAGE = 0.01


def shrunk(matrix: Tensor, shrinkage: float) -> Tensor:
    """Return (1 - s) M + s (trace(M) / d) I: a covariance that is moved towards a multiple of the identity.

    This is the linear form of Ledoit and Wolf (2004), with the intensity given instead of estimated.
    """
    d = len(matrix)
    identity = torch.eye(d, dtype=matrix.dtype, device=matrix.device)
    return (1 - shrinkage) * matrix + shrinkage * matrix.trace() / d * identity


def oas_shrinkage(matrix: Tensor, samples: float) -> float:
    """Return the shrinkage intensity of oracle approximating shrinkage (Chen et al. 2010, eq. 23), for Gaussian data.

    matrix: the covariance of `samples` independent samples. Tokens of one text are not independent, so for them this is
    a lower limit.
    """
    d, squares, trace = len(matrix), float(matrix.square().sum()), float(matrix.trace())
    most = (samples + 1 - 2 / d) * (squares - trace**2 / d)
    return 1.0 if most <= 0 else min(1.0, ((1 - 2 / d) * squares + trace**2) / most)


def erasing_edit(
    moments: Moments,
    rank: int | None = None,
    *,
    affine: bool = False,
    shrinkage: float | None = SHRINKAGE,
    what: str = "the data",
) -> tuple[Projection, Tensor]:
    """Return the edit of one layer, and the singular values of W cov(x, label), float64.

    rank: k, at most the number of languages - 1 (the default); fewer take the leading singular vectors.
    affine: LEACE with its offset; otherwise the linear form. shrinkage: of S, or None for `oas_shrinkage`.

    Numerics: float64; the tensors of the edit are float32. Directions in which the activations do not vary are left
    alone (pseudo-inverse).

    Raises SubspaceError for a rank that the data do not have, and for activations that do not differ by language.
    """
    second, cross = (moments.covariance if affine else moments.mean_square), moments.label_covariance
    intensity = oas_shrinkage(second, moments.total) if shrinkage is None else shrinkage
    values, vectors = torch.linalg.eigh(shrunk(second, intensity))
    used = values > values[-1].clamp_min(0) * len(values) * 2.0**-52
    vectors, roots = vectors[:, used], values[used].sqrt()
    left, singular, _ = torch.linalg.svd((vectors.T @ cross) / roots[:, None], full_matrices=False)
    # float32 activations that differ by rounding alone tell nothing of the language.
    scale = float(moments.mean_square.diagonal().max().sqrt())
    available = int((singular > singular[0] * max(cross.shape) * 2.0**-24).sum()) if len(singular) else 0
    if not available or float(cross.abs().max()) <= 2.0**-24 * scale:
        raise SubspaceError(
            f"there is no subspace to fit at {what}: the activations do not differ between languages.\n"
            "Were they measured on prompts in several languages? Collect again."
        )
    available = min(available, len(moments.counts) - 1)
    k = available if rank is None else rank
    if not 1 <= k <= available:
        raise SubspaceError(
            f"cannot fit rank {k} at {what}: the means of {len(moments.counts)} languages differ in {available} "
            f"dimensions.\nChoose --rank 1 to {available}, or collect with --pool last for --method deviations."
        )
    q = left[:, :k]
    signs = q.gather(0, q.abs().argmax(0, keepdim=True)).sign()
    q = q * signs  # equal data give equal files
    basis, dual = vectors @ (roots[:, None] * q), vectors @ (q / roots[:, None])
    offset = dual.T @ moments.mean if affine else None
    edit = Projection(basis.float().contiguous(), dual.float().contiguous(), None if offset is None else offset.float())
    return edit, singular


def label_covariance_left(moments: Moments, edit: Projection, strength: float = 1.0) -> float:
    """Return how much of cov(x, label) an edit leaves: norm(P cov) / norm(cov), with P = I - a A B^T."""
    cross, exact = moments.label_covariance, edit.double()
    left = cross - strength * exact.basis @ (exact.reads.T @ cross)
    return float(left.norm() / cross.norm())
