"""The numbers that one element of a quantised matrix can hold, and how they lie in 32-bit words and bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

# 4-bit floats (two bits of exponent, one of mantissa), by their codes 0 to 15.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Numbers:
    """The numbers of a format, before its scale.

    least, largest: their range. amax: what the scale rule divides the largest absolute value by. dtype: in a file that
    holds one number per element. bits: of an integer; 0 for a float.
    """

    least: float
    largest: float
    amax: float
    dtype: torch.dtype
    bits: int = 0

    def grid(self) -> Tensor:
        """Return all numbers of the format, ascending, in float64."""
        if self.bits:
            return torch.arange(self.least, self.largest + 1, dtype=torch.float64)
        codes = torch.arange(256, dtype=torch.uint8).view(self.dtype).double()
        return codes[codes.isfinite()].unique()

    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest number to each element, ties to even, in x's dtype. Beyond the range it is the end."""
        x = x.clamp(self.least, self.largest)
        return x.round() if self.bits else x.float().to(self.dtype).to(x.dtype)

    def spacing(self, numbers: Tensor) -> Tensor:
        """Return the distance from each number to the next one away from zero, in their dtype."""
        if self.bits:
            return torch.ones_like(numbers)
        _, exponent = torch.frexp(numbers)
        info = torch.finfo(self.dtype)
        ulp = torch.where(numbers == 0, 0.0, torch.exp2(exponent.to(numbers.dtype) - 1) * info.eps)
        return ulp.clamp_min(info.smallest_normal * info.eps)


FP8 = Numbers(-448.0, 448.0, 448.0, torch.float8_e4m3fn)


def integers(bits: int) -> Numbers:
    """Return the signed integers of some bits. compressed-tensors' rule spreads the range over all 2^bits of them."""
    half = 2.0 ** (bits - 1)
    return Numbers(-half, half - 1, half - 0.5, torch.int8, bits)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Return the signed integers [rows, columns] int8 of packed words [rows, words] int32.

    Each word holds 32 // bits of them, the first in its lowest bits, as unsigned numbers. Of the last word of a row
    some may be unused.
    """
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (numbers.reshape(len(words), -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Return the words [rows, words] int32 of integers [rows, columns]: the inverse of `unpack`."""
    each = 32 // bits
    padded = torch.nn.functional.pad(numbers.to(torch.int32) + (1 << (bits - 1)), (0, -numbers.shape[1] % each))
    shifts = torch.arange(each, dtype=torch.int32) * bits
    return (padded.reshape(len(padded), -1, each) << shifts).sum(-1, dtype=torch.int32)


def unpack_floats(codes: Tensor) -> Tensor:
    """Return the 4-bit floats [rows, 2 columns] float32 of bytes [rows, columns], the low half of each byte first."""
    table = torch.tensor(_E2M1)
    return torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], -1).reshape(len(codes), -1)
