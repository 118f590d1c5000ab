"""The arithmetic of quantisation: W_ij = scale (number_ij - zero), with one scale, and one zero point, per block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_surgery.quantised.numbers import Numbers

# Relative error of the float32 operations between an edited matrix and its numbers: a division, and a product.
FLOAT32 = 2.0**-22


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised.

    numbers: that an element can hold. block: (rows, columns) of one block; those at the end may be smaller. scale:
    the dtype of the scales. power: they are powers of two. symmetric: the zero points are zero.
    """

    numbers: Numbers
    block: tuple[int, int]
    scale: torch.dtype
    power: bool = False
    symmetric: bool = True

    def blocked(self, matrix: Tensor) -> Tensor:
        """Return a matrix as [rows of blocks, rows of a block, columns of blocks, columns of a block].

        It is padded with zeros, which change neither a block's scale nor its error.
        """
        rows, columns = self.block
        short = -matrix.shape[0] % rows, -matrix.shape[1] % columns
        padded = torch.nn.functional.pad(matrix, (0, short[1], 0, short[0])) if any(short) else matrix
        return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)

    def dequantise(self, numbers: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return scale (number - zero) in the scales' dtype. numbers: [rows, columns]. scale, zero: one per block."""
        blocks = self.blocked(numbers.to(scale.dtype))
        blocks = blocks if zero is None else blocks - _each(zero)
        return _matrix(blocks * _each(scale), numbers)

    def rule(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scale and the zero point (None if symmetric) of each block by the format's own rule.

        The scale is the largest absolute value over the largest number; without symmetry, the range over the range of
        the numbers. It is rounded to the dtype of the scales.
        """
        blocks, kind = self.blocked(matrix), self.numbers
        low, high = blocks.amin((1, 3)).clamp_max(0), blocks.amax((1, 3)).clamp_min(0)
        wide = torch.maximum(-low, high) / kind.amax if self.symmetric else (high - low) / (kind.largest - kind.least)
        if self.power:
            wide = torch.where(wide > 0, torch.exp2(torch.log2(wide).ceil()), wide)
        # A block of zeros needs a scale too. One that is too small for its dtype becomes its smallest normal number.
        least = torch.finfo(self.scale).smallest_normal
        scale = torch.where(wide > 0, wide.clamp_min(least), 1.0).to(self.scale).to(matrix.dtype)
        if self.symmetric:
            return scale, None
        return scale, (kind.least - low / scale).round().clamp(kind.least, kind.largest)

    def numbers_of(self, matrix: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return the numbers that are nearest to a matrix, in its dtype."""
        ratio = self.blocked(matrix) / _each(scale)
        return _matrix(self.numbers.nearest(ratio if zero is None else ratio + _each(zero)), matrix)

    def bound(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Return half the distance between neighbouring values at each element: the largest error of its rounding."""
        return _matrix(self.blocked(self.numbers.spacing(numbers)) * _each(scale) / 2, numbers)

    def by_rule(self, matrix: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the numbers, scales and zero points of a matrix by the format's own rule.

        zero: those in the file. A symmetric format may store some; they stay.
        """
        scale, new_zero = self.rule(matrix)
        new_zero = zero if new_zero is None else new_zero
        return self.numbers_of(matrix, scale, new_zero), scale, new_zero

    def slack(self, matrix: Tensor) -> Tensor:
        """Return how far beyond the range of the numbers the rule may leave each element: its scale is rounded.

        A scale that is a power of two is never too small.
        """
        roundoff = 0.0 if self.power else torch.finfo(self.scale).eps / 2
        blocks = self.blocked(matrix)
        reach = blocks.amax((1, 3), keepdim=True).clamp_min(0) - blocks.amin((1, 3), keepdim=True).clamp_max(0)
        return _matrix((roundoff * reach).expand_as(blocks), matrix)

    def requantise(self, matrix: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the numbers, scales and zero points of an edited matrix. scale, zero: those it had before.

        Every block gets the scale by the rule, or keeps its own if that is at least as near to the matrix and clips
        nothing. So a block that the edit leaves alone keeps its bytes, and no block is farther off than by the rule.

        Numerics: in the matrix's dtype.
        """
        new, new_scale, new_zero = self.by_rule(matrix, zero)
        old = self.numbers_of(matrix, scale, zero)
        errors = [
            self.blocked(self.dequantise(numbers, *how) - matrix).double()
            for numbers, how in ((new, (new_scale, new_zero)), (old, (scale, zero)))
        ]
        energies = [error.square().sum((1, 3)) for error in errors]
        room = self.blocked(self.bound(old, scale) + FLOAT32 * matrix.abs())
        keeps = (energies[1] <= energies[0]) & (errors[1].abs() <= room).all(3).all(1) & (scale > 0)
        chosen = _matrix(torch.where(_each(keeps), self.blocked(old), self.blocked(new)), matrix)
        if zero is not None and new_zero is not None:
            zero = torch.where(keeps, zero, new_zero)
        return chosen, torch.where(keeps, scale, new_scale), zero


def _each(blocks: Tensor) -> Tensor:
    return blocks[:, None, :, None]


def _matrix(blocks: Tensor, like: Tensor) -> Tensor:
    """Undo `Scheme.blocked`."""
    rows, columns = blocks.shape[0] * blocks.shape[1], blocks.shape[2] * blocks.shape[3]
    return blocks.reshape(rows, columns)[: like.shape[0], : like.shape[1]]
