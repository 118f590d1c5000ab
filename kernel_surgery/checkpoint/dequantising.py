"""A quantised checkpoint written as bfloat16: every quantised matrix becomes a plain one, the rest keeps its bytes.

One matrix is in memory at a time, of stacked experts one expert's. The files keep their names; one that held nothing
but scales is left out.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.files.contents import INDEX
from kernel_surgery.files.hashing import CHUNK
from kernel_surgery.files.tensorfile import Entry, Layout, one_of, read_layout, reserve, write_tensor
from kernel_surgery.models.stored import StoredPart, places
from kernel_surgery.quantised.formats import Format, belonging, quantised_in
from kernel_surgery.quantised.matrix import Matrix

CODE = "BF16"  # of the matrices that were quantised
# Called with what is edited and its tensor as [d_model, columns], or [d_model]; returns the edited tensor.
PartEdit = Callable[[StoredPart, torch.Tensor], torch.Tensor]


class Dequantised:
    """What a quantised checkpoint becomes as bfloat16.

    matrices: {name in the files: (matrix, format)}. shapes: {file: {tensor: (code, shape)}} of the new files.
    """

    def __init__(self, folder: Path, layouts: list[Layout]):
        self.folder, self.layouts = folder, [read_layout(layout.path) for layout in layouts]
        there = places(self.layouts)
        self.matrices: dict[str, tuple[Matrix, Format]] = quantised_in(folder, there)
        gone = {name for of, how in self.matrices.items() for name in belonging(of, *how, there)}
        self.shapes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {file.path.name: {} for file in self.layouts}
        for name, (path, entry) in there.items():
            if name not in gone:
                self.shapes[path.name][name] = entry.dtype, entry.shape
        for name, (matrix, how) in self.matrices.items():
            self.shapes[matrix.pieces["numbers"][0].name][name] = CODE, _plain_shape(matrix, how)
        self.dropped = sorted(gone - self.matrices.keys())

    @property
    def size(self) -> int:
        """The bytes of the new files, without their headers."""
        plain, total = places(self.layouts), 0
        for name, (_, shape) in ((name, entry) for shapes in self.shapes.values() for name, entry in shapes.items()):
            if name in self.matrices:
                total += 2 * math.prod(shape)
            else:
                total += plain[name][1].end - plain[name][1].begin
        return total

    def write_file(
        self, layout: Layout, folder: Path, edited: list[StoredPart], edit: PartEdit, advance: Callable[[int], object]
    ) -> None:
        """Write one weight file to a folder, with the edit. advance: called with the bytes of the source that are done.

        edited: what is edited. Numerics: a matrix is dequantised in float32, edited, and rounded once.
        """
        shapes = self.shapes[layout.path.name]
        own = {part.entry.begin: part for part in edited if part.path == layout.path}
        before = next(file for file in self.layouts if file.path == layout.path).entries
        if not shapes:
            advance(layout.size)
            return
        target = folder / layout.path.name
        entries = reserve(target, shapes, {"format": "pt"})
        with layout.path.open("rb") as source, target.open("r+b") as out:
            for name, entry in entries.items():
                if name in self.matrices:
                    self._write_matrix(name, out.fileno(), entry, own, edit)
                    numbers = self.matrices[name][0].pieces["numbers"][1]
                    advance(numbers.end - numbers.begin)
                    continue
                old = before[name]
                _copy(source.fileno(), old.begin, out.fileno(), entry)
                for begin, part in own.items():  # a bias, or a matrix that was not quantised
                    if old.begin <= begin < old.end and part.quantised is None:
                        place = dataclasses.replace(part.entry, begin=entry.begin + begin - old.begin)
                        write_tensor(out.fileno(), place, part.oriented(edit(part, part.read())))
                advance(old.end - old.begin)

    def _write_matrix(self, name: str, out: int, entry: Entry, own: Mapping[int, StoredPart], edit: PartEdit) -> None:
        matrix, how = self.matrices[name]
        stacked = len(entry.shape) > 2
        for number in range(entry.shape[0] if stacked else 1):
            one = matrix.expert(number) if stacked else matrix
            place = one_of(entry, number) if stacked else entry
            part, values = own.get(one.pieces["numbers"][1].begin), one.dequantised()
            if part is not None:
                values = part.oriented(edit(part, part.oriented(values)))
            values = values.bfloat16()
            write_tensor(out, place, values.T.contiguous() if how.swapped else values)

    def replaced(self) -> dict[str, str]:
        """Return {name: text} of the files beside the weights that say how they are stored."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        made = {"config.json": _text(without_quantisation(config))}
        if (self.folder / INDEX).is_file() and len(self.layouts) > 1:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            where = {name: file for file, shapes in self.shapes.items() for name in shapes}
            index["weight_map"] = dict(sorted(where.items()))
            index["metadata"] = dict(index.get("metadata") or {}) | {"total_size": self.size}
            made[INDEX] = _text(index)
        return made

    def record(self) -> dict[str, Any]:
        """Return what the provenance says of it."""
        formats = sorted({matrix.format for matrix, _ in self.matrices.values()})
        return {"how": "dequantised", "from": formats, "matrices": len(self.matrices), "dropped": len(self.dropped)}


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what it says about quantised weights."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    inner = kept.get("text_config")
    return kept | ({"text_config": without_quantisation(inner)} if isinstance(inner, dict) else {})


def _plain_shape(matrix: Matrix, how: Format) -> tuple[int, ...]:
    """Return the shape of a matrix that is not quantised, as transformers writes it; of stacked ones, of all."""
    numbers, own = matrix.pieces["numbers"][1], matrix.shape[::-1] if how.swapped else matrix.shape
    return (numbers.shape[0], *own) if how.stacks(numbers) else own


def _copy(source: int, begin: int, target: int, entry: Entry) -> None:
    """Copy the bytes of a tensor from `begin` of one open file to its place in another."""
    done, size = 0, entry.end - entry.begin
    while done < size:
        view = memoryview(os.pread(source, min(CHUNK, size - done), begin + done))
        while view:
            written = os.pwrite(target, view, entry.begin + done)
            done, view = done + written, view[written:]


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
