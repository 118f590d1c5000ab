"""One quantised matrix in the files of a checkpoint: read as floats, and written back in its own format."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kernel_surgery.files.tensorfile import QUANTISED, Entry, one_of, read_tensor, write_tensor
from kernel_surgery.quantised.blocks import Scheme
from kernel_surgery.quantised.numbers import pack, unpack, unpack_floats

Place = tuple[Path, Entry]
ROWS = 1024  # of a matrix that are floats at a time


def read(place: Place) -> Tensor:
    """Read one tensor of a file, in the dtype that it has there."""
    with place[0].open("rb") as file:
        return read_tensor(file.fileno(), place[1], QUANTISED)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantised matrix [rows, columns].

    format: in words. pieces: {role: place} of the tensors that it consists of. The roles are "numbers", "scale",
    "zero" (zero points) and "order" (the block of each column). refusal: why it cannot be written back, or None.
    """

    name: str
    format: str
    shape: tuple[int, int]
    scheme: Scheme
    pieces: Mapping[str, Place]
    refusal: str | None = None

    def load(self) -> "Loaded":
        """Read its tensors as they are stored."""
        held = {role: read(place) for role, place in self.pieces.items()}
        grid = tuple(-(-n // size) for n, size in zip(self.shape, self.scheme.block, strict=True))
        scale, zero, order = held["scale"], held.get("zero"), held.get("order")
        # Scales that are bytes hold the exponents of powers of two.
        scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if zero is not None and self.packed:
            zero = unpack(zero.reshape(zero.shape[0], -1).T.contiguous(), self.scheme.numbers.bits, grid[0]).T
        if order is not None and bool((order < 0).any()):
            order = None  # it was never set, and the columns are in order
        return Loaded(
            self,
            held["numbers"],
            scale.reshape(grid),
            None if zero is None else zero.float().reshape(grid),
            None if order is None else torch.argsort(order, stable=True),
        )

    @property
    def packed(self) -> bool:
        """Whether the integers are packed in 32-bit words."""
        return self.pieces["numbers"][1].dtype == "I32"

    def dequantised(self) -> Tensor:
        """Read the matrix as float32 numbers: scale (number - zero), rounded once."""
        loaded, made = self.load(), torch.empty(self.shape)
        for rows in loaded.slabs():
            made[rows] = loaded.rows(rows)
        return made

    def requantised(self, edited: Tensor) -> dict[str, Tensor]:
        """Return the tensors {role: tensor} of an edited matrix [rows, columns], as they are stored.

        Numerics: `Scheme.requantise`, in float32, ROWS rows at a time.
        """
        loaded, scheme = self.load(), self.scheme
        for rows in loaded.slabs():
            blocks = loaded.blocks(rows)
            zero = None if loaded.zero is None else loaded.zero[blocks]
            new = scheme.requantise(loaded.ordered(edited[rows].float()), loaded.scale[blocks], zero)
            numbers = loaded.unordered(new[0]).to(scheme.numbers.dtype)
            loaded.numbers[rows] = pack(numbers, scheme.numbers.bits) if self.packed else numbers
            loaded.scale[blocks] = new[1]
            if loaded.zero is not None and new[2] is not None:
                loaded.zero[blocks] = new[2]
        made = {"numbers": loaded.numbers, "scale": loaded.scale.to(scheme.scale)}
        if loaded.zero is not None:
            zero = loaded.zero.to(torch.int8)
            if self.packed:
                zero = pack(zero.T.contiguous(), scheme.numbers.bits).T.contiguous()
            made["zero"] = zero.to(QUANTISED[self.pieces["zero"][1].dtype])
        return {role: tensor.reshape(self.pieces[role][1].shape) for role, tensor in made.items()}

    def expert(self, number: int) -> "Matrix":
        """Return one expert's matrix of stacked ones, of which this one's pieces hold all along their first axis."""

        pieces = {role: (path, one_of(entry, number)) for role, (path, entry) in self.pieces.items()}
        return dataclasses.replace(self, name=f"{self.name}[{number}]", pieces=pieces)


def write(matrix: Matrix, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors of a matrix over the bytes that they have in a copy of its files in another folder."""
    for role, tensor in tensors.items():
        path, entry = matrix.pieces[role]
        with (folder / path.name).open("r+b") as file:
            write_tensor(file.fileno(), entry, tensor)


@dataclasses.dataclass
class Loaded:
    """The tensors of a matrix in memory. scale, zero: float32, one per block. order: the columns, sorted by block."""

    matrix: Matrix
    numbers: Tensor
    scale: Tensor
    zero: Tensor | None
    order: Tensor | None

    def slabs(self) -> Iterator[slice]:
        """Yield slices of about ROWS rows, of whole blocks."""
        rows, size = self.matrix.shape[0], self.matrix.scheme.block[0]
        step = size * max(1, ROWS // size)
        yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))

    def blocks(self, rows: slice) -> slice:
        """Return the rows of blocks of some rows."""
        size = self.matrix.scheme.block[0]
        return slice(rows.start // size, -(-rows.stop // size))

    def ordered(self, matrix: Tensor) -> Tensor:
        """Return the columns sorted by block."""
        return matrix if self.order is None else matrix[:, self.order]

    def unordered(self, matrix: Tensor) -> Tensor:
        """Undo `ordered`."""
        return matrix if self.order is None else matrix[:, torch.argsort(self.order)]

    def stored(self, rows: slice) -> Tensor:
        """Return the numbers of some rows, with the columns sorted by block."""
        held, bits = self.numbers[rows], self.matrix.scheme.numbers.bits
        if self.matrix.packed:
            held = unpack(held, bits, self.matrix.shape[1])
        elif held.dtype == torch.uint8:
            held = unpack_floats(held.reshape(held.shape[0], -1))
        return self.ordered(held)

    def rows(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return some rows as floats, of whole blocks."""
        blocks = self.blocks(rows)
        zero = None if self.zero is None else self.zero[blocks].to(dtype)
        made = self.matrix.scheme.dequantise(self.stored(rows), self.scale[blocks].to(dtype), zero)
        return self.unordered(made)
