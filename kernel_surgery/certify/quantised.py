"""The certificate of matrices that were quantised: the edit's error apart from the format's own rounding.

A matrix that was quantised again is compared with two things. Its error against the exact edit must not be larger than
what the format does to the exact edit by its own rule. And each element must be within half a step of its grid.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.checks import LEAK_GATE
from kernel_surgery.checkpoint.dequantising import without_quantisation
from kernel_surgery.edit.baked import remove
from kernel_surgery.files.hashing import CHUNK
from kernel_surgery.files.tensorfile import one_of
from kernel_surgery.models.stored import StoredPart, located
from kernel_surgery.numerics.bounds import requantised_bound, worst_ratio
from kernel_surgery.numerics.oracle import quantised_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.quantised.formats import Format, belonging, quantised_in
from kernel_surgery.quantised.matrix import Loaded, Matrix, Place, read

GATE = 1.1  # limit of a matrix's error over its format's own rounding of the exact edit


class _Inside:
    """B^T W [k, columns] of a matrix that comes a few stored rows at a time. transposed: a stored row is a column."""

    def __init__(self, edit: Projection, part: StoredPart):
        self.reads, self.transposed = edit.reads, part.form.transposed
        columns = part.entry.shape[0 if self.transposed else 1]
        self.sum = torch.zeros(edit.basis.shape[1], columns, dtype=torch.float64)

    def add(self, rows: slice, matrix: Tensor) -> None:
        if self.transposed:
            self.sum[:, rows] = self.reads.T @ matrix.T
        else:
            self.sum += self.reads[rows].T @ matrix


class _Errors:
    """The sum of squares and the largest of some errors."""

    def __init__(self) -> None:
        self.energy, self.most = 0.0, 0.0

    def add(self, error: Tensor) -> None:
        self.energy += float(error.square().sum())
        self.most = max(self.most, float(error.abs().max()))


def check_requantised(after: StoredPart, before: StoredPart, basis: Projection, strength: float) -> dict[str, Any]:
    """Check one matrix that was edited and quantised again.

    after, before: the edited and the original one, quantised alike. basis: the edit of its layer. strength: a.

    Returns the figures of `certify.checks.check_tensor`, whose bound has half a step of the format's grid instead of a
    rounding, and whose floor is the leak of the exact edit in that format. And these, each relative to the norm of the
    exact edit, with "_max" the largest of an element over the root mean square of the exact edit:
        "edit_error": of the edit in float32, before it is quantised. "edit_over_bound": over its bound.
        "rounding": of the exact edit, quantised by the format's own rule.
        "requantised": of the file. "requantised_over_rounding": their ratio.

    Numerics: float64 from the stored numbers and scales, `quantised.matrix.ROWS` rows at a time.
    """
    assert after.quantised is not None and before.quantised is not None  # the caller chose them
    edit, scheme = Projection.of(basis).double(), before.quantised.scheme
    old, new = before.quantised.load(), after.quantised.load()
    z, columns, exact_energy = _Inside(edit, before), _columns(old, before), 0.0
    for rows in old.slabs():
        z.add(rows, old.rows(rows, torch.float64))
    changes = strength * (edit.basis @ z.sum) if before.form.transposed else None
    spread = abs(strength) * math.sqrt(edit.basis.shape[0]) * edit.gain()[:, None] * columns
    edited = before.oriented(remove(before.read(), basis, strength)[0])
    left, floor = _Inside(edit, before), _Inside(edit, before)
    errors = {name: _Errors() for name in ("edit_error", "rounding", "requantised")}
    worst, worst_edit, finite = 0.0, 0.0, True
    for rows in old.slabs():
        w, file = old.rows(rows, torch.float64), new.rows(rows, torch.float64)
        exact = w - (strength * (edit.basis[rows] @ z.sum) if changes is None else changes.T[rows])
        room = (spread.T if before.form.transposed else spread)[rows]
        ruled, chosen = _in_format(old, rows, exact)
        own = old.unordered(ruled) - exact
        half = new.unordered(scheme.bound(new.stored(rows).double(), new.scale[new.blocks(rows)].double()))
        half = half + old.unordered(scheme.slack(old.ordered(exact)))
        worst = max(worst, worst_ratio((file - exact).abs(), requantised_bound(half, exact, w, room)))
        wide = edited[rows].double() - exact
        worst_edit = max(worst_edit, worst_ratio(wide.abs(), requantised_bound(0 * half, exact, w, room)))
        for name, error in (("edit_error", wide), ("rounding", own), ("requantised", file - exact)):
            errors[name].add(error)
        left.add(rows, file)
        floor.add(rows, old.unordered(chosen) - exact)
        exact_energy += float(exact.square().sum())
        finite = finite and bool(torch.isfinite(file).all())
    norm, rms = math.sqrt(exact_energy), math.sqrt(exact_energy / w.shape[1] / before.quantised.shape[0])
    row: dict[str, Any] = {name: math.sqrt(own.energy) / norm for name, own in errors.items()}
    row |= {f"{name}_max": own.most / rms for name, own in errors.items()}
    row["requantised_over_rounding"] = _ratio(row["requantised"], row["rounding"])
    row |= {"edit_over_bound": worst_edit, "error_over_bound": worst, "finite": finite}
    return row | _leak(z.sum, left.sum - (1 - strength) * z.sum, floor.sum, columns, edit, strength)


def _leak(
    z: Tensor, left: Tensor, rounding: Tensor, columns: Tensor, edit: Projection, strength: float
) -> dict[str, float]:
    """Return how much is left that should be gone, beside what the format leaves by itself (`check_tensor`)."""
    inside, d = float(z.norm()), edit.basis.shape[0]
    if not inside:
        return {"leak": 0.0, "leak_floor": 0.0, "leak_over_floor": 0.0, "leak_gate": LEAK_GATE}
    reach = float(edit.reads.norm()) * float(columns.norm()) / inside / math.sqrt(d)
    floor = float(rounding.norm()) / inside + abs(strength) * 2.0**-22 * (math.sqrt(d) + 2 * reach)
    leak = float(left.norm()) / inside
    leak = leak if math.isfinite(leak) else math.inf
    return {"leak": leak, "leak_floor": floor, "leak_over_floor": _ratio(leak, floor), "leak_gate": LEAK_GATE}


def _ratio(one: float, other: float) -> float:
    ratio = one / other if other else math.inf if one else 0.0
    return ratio if math.isfinite(ratio) else math.inf


def _columns(loaded: Loaded, part: StoredPart) -> Tensor:
    """Return the norm of each column of W [1, columns] float64."""
    energies = torch.zeros(part.entry.shape[0 if part.form.transposed else 1], dtype=torch.float64)
    for rows in loaded.slabs():
        squares = loaded.rows(rows, torch.float64).square()
        if part.form.transposed:
            energies[rows] = squares.sum(1)
        else:
            energies += squares.sum(0)
    return energies.sqrt()[None]


def _in_format(old: Loaded, rows: slice, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact edit of some rows by the format's rule, and as bake writes it: columns sorted by block."""
    scheme, blocks, exact = old.matrix.scheme, old.blocks(rows), old.ordered(exact)
    zero = None if old.zero is None else old.zero[blocks].double()
    if scheme.symmetric and zero is None:
        ruled = quantised_oracle(exact, scheme.numbers.grid(), scheme.block, scheme.scale, scheme.power)
    else:
        ruled = scheme.dequantise(*scheme.by_rule(exact, zero))
    return ruled, scheme.dequantise(*scheme.requantise(exact, old.scale[blocks].double(), zero))


def requantised_faults(row: dict[str, Any]) -> list[str]:
    """Return the limits that the figures of `check_requantised` alone exceed, in words."""
    faults = []
    if not row["edit_over_bound"] <= 1:
        faults.append(f"its edit before it is quantised is off by {row['edit_over_bound']:.3g} times its bound")
    if not row["requantised_over_rounding"] <= GATE:
        faults.append(
            f"its error is {row['requantised_over_rounding']:.3g} times the format's own rounding of the exact edit "
            f"(allowed: {GATE})"
        )
    return faults


def dequantised_faults(folder: Path, source: Path, edited: set[str]) -> list[str]:
    """Compare a checkpoint that was written as bfloat16 with its quantised original, but for the edited tensors.

    Every matrix must be the original's, dequantised and rounded once; every other tensor the same; config.json the
    original's without what it says about quantisation.
    """
    there, before = located(folder), located(source)
    matrices = quantised_in(source, before)
    gone = {name for of, how in matrices.items() for name in belonging(of, *how, before)}
    expected = (before.keys() - gone) | matrices.keys()
    faults = [f"{name} is in only one of the two checkpoints" for name in sorted(there.keys() ^ expected)]
    for name in sorted((there.keys() & expected) - edited):
        same = _same_matrix(there[name], *matrices[name]) if name in matrices else same_bytes(there[name], before[name])
        if not same:
            faults.append(f"{name} should not have been edited, but differs from the original")
    configs = [json.loads((where / "config.json").read_text(encoding="utf-8")) for where in (folder, source)]
    if configs[0] != without_quantisation(configs[1]):
        faults.append("config.json differs from the original's in more than what it says about quantisation")
    return faults


def _same_matrix(place: Place, matrix: Matrix, how: Format) -> bool:
    """Return whether a bfloat16 tensor is a quantised matrix of the original, or all of its stacked ones."""
    (path, entry), stacked = place, len(place[1].shape) > 2
    for number in range(entry.shape[0] if stacked else 1):
        values = read((path, one_of(entry, number) if stacked else entry))
        one = matrix.expert(number) if stacked else matrix
        expected = one.dequantised().bfloat16()
        if values.dtype != torch.bfloat16 or not torch.equal(values, expected.T if how.swapped else expected):
            return False
    return True


def same_bytes(one: Place, other: Place) -> bool:
    """Return whether two tensors, each in its own file, have the same dtype, shape and bytes."""
    (path, first), (path_2, second) = one, other
    size, done = first.end - first.begin, 0
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with path.open("rb") as mine, path_2.open("rb") as theirs:
        while done < size:
            n = min(CHUNK, size - done)
            if os.pread(mine.fileno(), n, first.begin + done) != os.pread(theirs.fileno(), n, second.begin + done):
                return False
            done += n
    return True
