"""One layer's edit as tensors: y = x - a A (B^T x - c), with B^T A = I.

An orthogonal edit is the special case A = B = U with orthonormal columns and c = 0. Every function that takes a basis
takes either: a tensor U, or a `Projection`.

Source of the oblique form: Belrose et al. 2023, LEACE (arXiv:2306.03819).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """The tensors of one layer's edit.

    basis: A [d, k], what is written: the removed part lies in its span.
    dual: B [d, k], what is read. None means the basis; then the edit is orthogonal.
    offset: c [k], or None for 0.
    """

    basis: Tensor
    dual: Tensor | None = None
    offset: Tensor | None = None

    @staticmethod
    def of(value: "BasisLike") -> "Projection":
        """Return a projection; a tensor is the basis of an orthogonal one."""
        return value if isinstance(value, Projection) else Projection(value)

    @property
    def reads(self) -> Tensor:
        """B, which is the basis where there is no dual."""
        return self.basis if self.dual is None else self.dual

    @property
    def linear(self) -> "Projection":
        """The same edit without its offset: what it does to a weight, or to a difference of activations."""
        return Projection(self.basis, self.dual)

    def keeping(self, mean: Tensor) -> "Projection":
        """Return the same edit with c = B^T mean, which leaves `mean` [d] where it is. In the dtype of both."""
        return Projection(self.basis, self.dual, self.reads.T @ mean)

    def for_tensor(self, ndim: int) -> "Projection":
        """Return the edit of a weight [d, columns], or of a bias [d]: only a bias takes the offset."""
        return self if ndim == 1 else self.linear

    def map(self, function: Callable[[Tensor], Tensor]) -> "Projection":
        """Return a projection of function(tensor) for every tensor that it has."""
        return Projection(*(None if t is None else function(t) for t in (self.basis, self.dual, self.offset)))  # type: ignore[arg-type]  # there is a basis

    def to(self, where: torch.device | torch.dtype | str) -> "Projection":
        """Return a projection on another device, or of another dtype."""
        return self.map(lambda tensor: tensor.to(where))

    def double(self) -> "Projection":
        """Return the projection in float64."""
        return self.to(torch.float64)

    def inside(self, x: Tensor) -> Tensor:
        """Return z = B^T x - c for rows x [..., d], [..., k], in the dtype of both."""
        z = x @ self.reads
        return z if self.offset is None else z - self.offset

    def gain(self) -> Tensor:
        """Return sqrt(sum_j A_ij^2 norm(B_j)^2), [d] float64: how far an error of B^T x reaches into element i.

        An error of z_j is at most in proportion to norm(B_j) norm(x). For an orthonormal U this is norm(U_i). It does
        not change if a column of A is divided by a number and that of B multiplied by it.
        """
        a = self.basis.double()
        return a.norm(dim=1) if self.dual is None else (a * self.dual.double().norm(dim=0)).norm(dim=1)

    def mixing(self) -> Tensor:
        """Return the norms of the rows of A B^T, [d] float64: how far an error of x reaches into element i.

        For an orthonormal U this is norm(U_i).
        """
        a = self.basis.double()
        if self.dual is None:
            return a.norm(dim=1)
        triangle = torch.linalg.qr(self.dual.double())[1]
        return (a @ triangle.T).norm(dim=1)

    def offset_rows(self) -> Tensor | float:
        """Return sqrt(sum_j A_ij^2 c_j^2), [d] float64, the scale of the offset in element i; 0 without an offset."""
        return 0.0 if self.offset is None else (self.basis.double() * self.offset.double()).norm(dim=1)

    def norm(self, strength: float) -> float:
        """Return the spectral norm of I - a A B^T. For an orthonormal U it is max(1, |1 - a|)."""
        if self.dual is None:
            return max(1.0, abs(1 - strength))
        # Outside the span of A and B it is the identity, so a matrix of that span's size shows the norm.
        a, b = self.basis.double(), self.dual.double()
        q = torch.linalg.qr(torch.cat([a, b], dim=1))[0]
        inner = torch.eye(q.shape[1], dtype=torch.float64, device=q.device) - strength * (q.T @ a) @ (q.T @ b).T
        return max(1.0, float(torch.linalg.matrix_norm(inner, 2)))


BasisLike = Tensor | Projection
