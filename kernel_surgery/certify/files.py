"""Certificates of what lies on disk: a baked checkpoint, an adapter, a restored checkpoint.

Each verifier hashes every file again, reads what it needs of one tensor at a time, and returns the certificate as a
dict: "tensors" (a row each), "faults" (sentences, empty if everything holds), and what it is a certificate of.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kernel_surgery.certify.checks import broken, check_tensor
from kernel_surgery.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, configuration
from kernel_surgery.checkpoint.baking import BASE_CARD, UNDO
from kernel_surgery.checkpoint.record import BASES, read_bases, read_provenance
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.progress import progress
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.files.folder import PROVENANCE, changed_files, located, others, weight_files
from kernel_surgery.files.hashing import CHUNK, sha256
from kernel_surgery.files.tensorfile import Entry, opened, read_tensor
from kernel_surgery.models.architectures import LLAMA
from kernel_surgery.numerics.bounds import adapter_bound, undo_bound, worst_ratio
from kernel_surgery.subspace.artifact import Subspace

Place = tuple[Path, Entry]


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two tensors, each in its file, are the same to the byte."""
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


def check_files(folder: Path, record: dict) -> list[str]:
    """Files whose hash is not the recorded one, that are missing, or that nobody recorded."""
    faults = changed_files(folder, record["sha256"])
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    unknown = sorted(there - record["sha256"].keys() - {PROVENANCE})
    return faults + [f"{name} was not there when the checkpoint was written" for name in unknown]


def check_others(folder: Path, source: Path | None) -> list[str]:
    """What lies in a baked or restored folder beside its weights: each file the original's, to the byte, or our own."""
    weights = {file.name for file in weight_files(folder)}
    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    faults = [
        f"{name} holds weights that are not the checkpoint's"
        for name in sorted(there)
        if name.endswith(".safetensors") and name not in weights | {UNDO.as_posix(), BASES.as_posix()}
    ]
    if source is None:
        return faults
    own = weights | {PROVENANCE, "README.md", BASE_CARD, UNDO.as_posix(), BASES.as_posix()}
    along = {file.name: file for file in others(source)[0] if file.name not in weights}
    for name in sorted(there.keys() - own | (along.keys() - {"README.md"})):
        if name not in along:
            faults.append(f"{name} is not in the original")
        elif name not in there:
            faults.append(f"{name} of the original is missing")
        elif sha256(there[name]) != sha256(along[name]):
            faults.append(f"{name} is not the original's")
    return faults


def read(place: Place) -> Tensor:
    """One tensor, as [rows, columns]."""
    path, entry = place
    with path.open("rb") as file:
        tensor = read_tensor(file.fileno(), entry)
    return tensor.reshape(tensor.shape[0], -1)


def basis_faults(bases: dict, subspace: Path, folder: Path) -> tuple[dict, list[str]]:
    """(the bases of a subspace file, where they are not those that the checkpoint was baked with)."""
    given = dict(Subspace.load(subspace, force=True).bases)
    if given.keys() != bases.keys() or any(given[i].shape != bases[i].shape for i in given):
        raise CheckpointError(
            f"{str(folder)!r} was baked with a subspace of layers {sorted(bases)}, {str(subspace)!r} has "
            f"{sorted(given)} (or another rank). Nothing was verified."
        )
    other = [i for i in given if not torch.equal(given[i], bases[i])]
    return given, [f"layer {i}: baked with another basis than {str(subspace)!r} has" for i in other]


@dataclass
class _Certificate:
    """A certificate of a folder under way: what its record says, its bases, and the faults and rows so far."""

    kind: str
    folder: Path
    source: Path | None
    record: dict
    bases: dict[int, Tensor]
    faults: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)

    @classmethod
    def of(
        cls, kind: str, folder: Path, source: Path | None, subspace: Path | None, record: dict, bases_file: Path = BASES
    ) -> "_Certificate":
        """The head of every verifier: hashes, and the bases (those of `subspace` where it is given)."""
        made = cls(kind, folder, source, record, read_bases(folder, record, bases_file))
        made.faults += check_files(folder, record)
        if kind != "adapter":
            made.faults += check_others(folder, source)
        if subspace is not None:
            made.bases, wrong = basis_faults(made.bases, subspace, folder)
            made.faults += wrong
        return made

    @property
    def strength(self) -> float:
        return float(self.record["strength"])

    def places(self) -> tuple[dict[str, Place], dict[str, Place]]:
        """Where the tensors of the folder, and of the original, lie; a fault for each that only one of them has."""
        new, old = located(self.folder), {} if self.source is None else located(self.source)
        if self.source is not None:
            alone = sorted(new.keys() ^ old.keys())
            self.faults += [f"{name} is in one of the two checkpoints only" for name in alone]
        return new, old

    def done(self, note: str | None = None) -> dict:
        """The tail of every verifier: the certificate as a dict."""
        source = None if self.source is None else str(self.source)
        return {
            "kind": "certificate",
            "of": {self.kind: str(self.folder), "model": source},
            **({} if note is None else {"note": note}),
            **{key: self.record[key] for key in ("model_id", "strength", "rank")},
            **{"tensors": self.rows, "faults": self.faults, "environment": environment_record()},
        }


def verify_checkpoint(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of a baked checkpoint.

    source: the original checkpoint. subspace: the one it is said to be baked with (its bases replace those that were
    kept beside the weights). For every edited tensor the leak, norm(U^T W' - (1-a) U^T W) / norm(U^T W), is computed in
    float64 from the file and held to its floor; with `source`, every edited element is held to
    `bounds.baked_element_bound` and every other tensor must be equal to the byte.

    Raises CheckpointError for a folder that is not a baked checkpoint, a subspace that does not fit it, and files that
    cannot be read.
    """
    found = _Certificate.of("baked", folder, source, subspace, read_provenance(folder), UNDO)
    with opened(folder / UNDO) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new, old = found.places()
    for name in progress(sorted(new), total=len(new), desc="verify"):
        layer = LLAMA.edited_layer(name, found.bases)
        if layer is None:
            if name in old and not same_bytes(new[name], old[name]):
                found.faults.append(f"{name} was not to be edited, and differs from the original")
            continue
        after, before, inside = read(new[name]), None, kept.get(f"inside.{name}")
        if name in old:
            before = read(old[name])
            if (before.shape, before.dtype) != (after.shape, after.dtype):
                found.faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
                continue
        elif inside is None:
            missing = "what was removed is not on record, and without --model not known"
            found.faults.append(f"layer {layer}: {name}: {missing}")
            continue
        row = {"layer": layer, "tensor": name, "dtype": new[name][1].dtype}
        row |= check_tensor(after, before, inside, found.bases[layer], found.strength)
        found.rows.append(row)
        found.faults += [f"layer {layer}: {name}: {what}" for what in broken(row)]
    for layer in found.bases:
        name = f"{LLAMA.site(layer)}.weight"
        if name not in new:
            found.faults.append(f"layer {layer}: {name} is missing")
    return found.done()


def verify_adapter(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of an adapter's files.

    B must be -U to the bit, the padding of the rank zero, and the scaling 1. With the original, A is held to
    `bounds.adapter_bound`, and "leak_bfloat16" says what is left of U^T W in an engine that rounds A and B to bfloat16.
    Raises CheckpointError for a folder that is not an adapter of ours.
    """
    record = read_provenance(folder, "adapter")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        expected_rank = int(record["padded_rank"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{str(folder / CONFIG)!r} is no configuration of an adapter ({error}).") from error
    found = _Certificate.of("adapter", folder, source, subspace, record)
    expected = configuration(record)
    for key in sorted(config.keys() | expected.keys()):
        if config.get(key) != expected.get(key) or (key in config) != (key in expected):
            found.faults.append(f"{CONFIG}: {key} is {config.get(key)!r}, not {expected.get(key)!r}")
    old = {} if source is None else located(source)
    with opened(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for layer, basis in progress(found.bases.items(), total=len(found.bases), desc="verify"):
        module = LLAMA.site(layer)
        a, b = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
        k, d = basis.shape[1], basis.shape[0]
        if a is None or b is None or a.shape[0] < k or tuple(b.shape) != (d, len(a)) or len(a) != expected_rank:
            found.faults.append(f"layer {layer}: {module}: A or B is missing, or of another shape")
            continue
        weight = None
        if source is not None:
            place = old.get(f"{module}.weight")
            if place is None or place[1].shape != (d, a.shape[1]):
                found.faults += _pair_faults(layer, a, b, basis, None)
                shape = (d, a.shape[1])
                found.faults.append(f"layer {layer}: {module}: the original has no weight of shape {shape}")
                continue
            weight = read(place)
        row = _pair_row(layer, a, b, basis, weight, found.strength)
        found.rows.append(row)
        found.faults += _pair_faults(layer, a, b, basis, row)
    found.faults += [f"{name} is of no layer of the subspace" for name in sorted(tensors)]
    return found.done("A was not compared with a U^T W: give --model for that" if source is None else None)


def _pair_row(layer: int, a: Tensor, b: Tensor, basis: Tensor, weight: Tensor | None, strength: float) -> dict:
    """The figures of one adapted layer; without the original's weight only whether they are finite."""
    row = {"layer": layer, "tensor": f"{LLAMA.site(layer)}.lora_A", "dtype": str(a.dtype).removeprefix("torch.")}
    row |= {"error_over_bound": None, "leak_bfloat16": None, "finite": bool(torch.isfinite(a).all())}
    if weight is not None:
        inside = basis.double().T @ weight.double()
        error = (a[: basis.shape[1]].double() - strength * inside).abs()
        row["error_over_bound"] = worst_ratio(error, adapter_bound(weight, strength))
        rounded = basis.double().T @ b.bfloat16().double() @ a.bfloat16().double() + strength * inside
        row["leak_bfloat16"] = float(rounded.norm() / inside.norm())
    return row


def _pair_faults(layer: int, a: Tensor, b: Tensor, basis: Tensor, row: dict | None) -> list[str]:
    """What is wrong with one adapted layer, in sentences; `row`: its figures, where there are any."""
    where, k, faults = f"layer {layer}: {LLAMA.site(layer)}", basis.shape[1], []
    if not torch.equal(b[:, :k], -basis):
        faults.append(f"{where}: B is not -U")
    if a[k:].any() or b[:, k:].any():
        faults.append(f"{where}: what fills the rank up is not zero")
    if row is None:
        return faults
    if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1:
        faults.append(f"{where}: A is {row['error_over_bound']:.3g} times its bound off")
    if not row["finite"]:
        faults.append(f"{where}: A holds NaN or Inf")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        faults.append(f"{where}: A is {a.dtype}, B {b.dtype}; both should be float32")
    return faults


def verify_restored(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict:
    """The certificate of a checkpoint whose edit was taken back.

    With the original, every tensor that was edited is within `bounds.undo_bound` of it, and every other is equal to
    the byte. Without it, hashes alone. Raises CheckpointError for a folder that is not a restored checkpoint.
    """
    found = _Certificate.of("restored", folder, source, subspace, read_provenance(folder, "restored"))
    new, old = found.places()
    for name in progress(sorted(new.keys() & old.keys()), total=len(new), desc="verify"):
        layer = LLAMA.edited_layer(name, found.bases)
        if layer is None:
            if not same_bytes(new[name], old[name]):
                found.faults.append(f"{name} was never edited, and differs from the original")
            continue
        back, weight = read(new[name]), read(old[name])
        if (back.shape, back.dtype) != (weight.shape, weight.dtype):
            found.faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
            continue
        basis, worst = found.bases[layer], 0.0
        for start in range(0, weight.shape[1], 1024):
            part = weight[:, start : start + 1024]
            off = (back[:, start : start + 1024].double() - part.double()).abs()
            bound = undo_bound(part, bake_weight(part, basis, found.strength), basis, found.strength)
            worst = max(worst, worst_ratio(off, bound))
        found.rows.append({"layer": layer, "tensor": name, "dtype": new[name][1].dtype, "error_over_bound": worst})
        if not worst <= 1:
            where = f"layer {layer}: {name}"
            found.faults.append(f"{where}: an element is {worst:.3g} times its bound away from the original")
    return found.done()
