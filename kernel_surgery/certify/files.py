"""The certificates of files on disk: a baked checkpoint, an adapter, a restored checkpoint.

Each verifier hashes every file again and reads one tensor at a time. It returns the certificate as a dict: "tensors"
has one row per tensor, "faults" holds sentences and is empty if everything holds, and "of" says which folder was
checked.
"""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.checks import broken, check_tensor
from kernel_surgery.certify.quantised import check_requantised, dequantised_faults, requantised_faults, same_bytes
from kernel_surgery.checkpoint.adapter import CONFIG, WEIGHTS, configuration, edited_by, unpacked
from kernel_surgery.checkpoint.record import (
    BASE_CARD,
    BASES,
    UNDO,
    edits_file,
    forced_note,
    is_dequantised,
    read_edits,
    read_provenance,
    strength_at,
)
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import shareable
from kernel_surgery.common.names import PROVENANCE
from kernel_surgery.common.progress import progress
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.files.contents import DOCUMENT, INDEX, contents
from kernel_surgery.files.folder import changed_files
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.tensorfile import opened
from kernel_surgery.models.load import public_name
from kernel_surgery.models.stored import StoredPart, layout_in, layouts, located, parts
from kernel_surgery.numerics.bounds import adapter_bound, undo_bound, worst_ratio
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace


def seen(folder: Path) -> dict[str, Path]:
    """Return {name: path} of the files in a folder, without the hidden ones."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.split("/"))}


def check_files(folder: Path, record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return faults for files that changed since they were recorded, are missing, or were never recorded, and remarks.

    Remarks are on documents at the top of the folder. Hidden files are not looked at: the hub's downloads add some.
    """
    hashes, names = record["sha256"], seen(folder).keys()
    documents = {name for name in (*hashes, *names) if DOCUMENT.fullmatch(name)}
    faults, remarks = (
        changed_files(folder, {name: digest for name, digest in hashes.items() if (name in documents) == kind})
        for kind in (False, True)
    )
    for name in sorted(names - hashes.keys() - {PROVENANCE}):
        (remarks if name in documents else faults).append(f"{name} was not there when the checkpoint was written")
    return faults, [f"{remark}, and no engine reads it" for remark in remarks]


def check_others(folder: Path, source: Path | None, rewritten: Container[str] = ()) -> list[str]:
    """Check the files beside the weights of a baked or restored folder.

    Each must be byte for byte the original's, one of ours, or a document. Without `source` only the safetensors files
    are checked. rewritten: those that may differ from the original's. Returns faults.
    """
    weights, there = set(contents(folder).weights), seen(folder)
    faults = [
        f"{name} holds weights that do not belong to the checkpoint"
        for name in sorted(there)
        if name.endswith(".safetensors") and name not in weights | {UNDO.as_posix(), BASES.as_posix()}
    ]
    if source is None:
        return faults
    own = weights | {PROVENANCE, "README.md", BASE_CARD, UNDO.as_posix(), BASES.as_posix()}
    along = {name: source / name for name in contents(source).along}
    for name in sorted(there.keys() - own | (along.keys() - {"README.md"})):
        if DOCUMENT.fullmatch(name):
            continue  # `check_files` has a remark on it
        if name not in along:
            faults.append(f"{name} is not in the original")
        elif name not in there:
            faults.append(f"{name} of the original is missing")
        elif name not in rewritten and sha256(there[name]) != sha256(along[name]):
            faults.append(f"{name} differs from the original's")
    return faults


def read(part: StoredPart) -> Tensor:
    """Read what is edited as [d_model, columns]; a bias has one column."""
    return (tensor := part.read()).reshape(tensor.shape[0], -1)


def edited_in(folder: Path, layers: Container[int]) -> dict[str, StoredPart]:
    """Return {name: what an edit of `layers` changes in a checkpoint}."""
    return {part.name: part for part in parts(layout_in(folder), layouts(folder), layers)}


def edit_faults(
    edits: dict[int, Projection], record: dict[str, Any], file: Path, folder: Path
) -> tuple[dict[int, Projection], list[str]]:
    """Return the edits of a subspace file, and a fault for each tensor that differs from the checkpoint's.

    record: of the checkpoint. file: the subspace. Raises CheckpointError if the layers or the rank differ.
    """
    subspace = Subspace.load(file, force=True)
    expected = subspace.projections
    if expected.keys() != edits.keys() or any(expected[i].basis.shape != edits[i].basis.shape for i in expected):
        layers = [f"layers {sorted(b)}, basis {list(next(iter(b.values())).basis.shape)}" for b in (edits, expected)]
        raise CheckpointError(
            f"{str(folder)!r} was made with {layers[0]}, but {str(file)!r} has {layers[1]}. Omit --subspace."
        )
    faults = []
    for layer, edit in expected.items():
        for part in ("basis", "dual", "offset"):
            one, other = getattr(edit, part), getattr(edits[layer], part)
            if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
                faults.append(f"layer {layer}: the {part} differs from that in {shareable(file)!r}")
        factor = subspace.strength_at(layer, float(record["strength"]))
        if strength_at(record, layer) != factor:
            faults.append(f"layer {layer}: the strength is {strength_at(record, layer):g}, by the subspace {factor:g}")
    return expected, faults


@dataclass
class _Certificate:
    """A certificate in progress: the record, the edits, and the faults and rows so far."""

    kind: str
    folder: Path
    source: Path | None
    record: dict[str, Any]
    edits: dict[int, Projection]
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        kind: str,
        folder: Path,
        source: Path | None,
        subspace: Path | None,
        record: dict[str, Any],
    ) -> "_Certificate":
        """Begin a certificate: check the hashes, and read the edits (from `subspace` if it is given)."""
        certificate = cls(kind, folder, source, record, read_edits(folder, record, edits_file(record)))
        certificate.faults, certificate.remarks = check_files(folder, record)
        certificate.remarks += filter(None, [forced_note(record)])
        if kind != "adapter":
            rewritten = ("config.json", INDEX) if is_dequantised(record) else ()
            certificate.faults += check_others(folder, source, rewritten)
        if subspace is not None:
            certificate.edits, wrong = edit_faults(certificate.edits, record, subspace, folder)
            certificate.faults += wrong
        return certificate

    def strength(self, layer: int) -> float:
        return strength_at(self.record, layer)

    def parts(self, differs: str) -> tuple[dict[str, StoredPart], dict[str, StoredPart]]:
        """Return what the edit changes, in the folder and in the original. Every other tensor must be the same.

        Adds a fault for every tensor that only one of them has, and for every other tensor that `differs`.
        """
        there, before = located(self.folder), {} if self.source is None else located(self.source)
        new = edited_in(self.folder, self.edits)
        old = {} if self.source is None else edited_in(self.source, self.edits)
        ours = {name for part in new.values() for name in part.tensors}
        if self.source is not None and is_dequantised(self.record):
            self.faults += dequantised_faults(self.folder, self.source, ours)
            return new, old
        if self.source is not None:
            alone = sorted((there.keys() ^ before.keys()) | (new.keys() ^ old.keys()))
            self.faults += [f"{name} is in only one of the two checkpoints" for name in alone]
        others = [(name, place) for name, place in sorted(there.items()) if name not in ours and name in before]
        changed = [name for name, place in progress(others, desc="compare") if not same_bytes(place, before[name])]
        if 2 * len(changed) > len(others):
            what = f"{len(changed)} of {len(others)} tensors that are not edited differ"
            self.faults.insert(0, f"{what}: is it another model?")
        self.faults += [f"{name} {differs}" for name in changed]
        return new, old

    def requantised(self, name: str, part: StoredPart, original: StoredPart | None) -> None:
        """Check one matrix that was quantised again. original: the same one in the original, or None."""
        where = f"layer {part.layer}: {name}"
        if original is None:
            why = "it was quantised again, so only the original shows what was edited; give --model"
            self.faults.append(f"{where}: {why}" if self.source is None else f"{where}: it is not in the original")
            return
        one, other = part.quantised, original.quantised
        if one is None or other is None or (one.shape, one.scheme) != (other.shape, other.scheme):
            self.faults.append(f"{where} is quantised in another way than the original")
            return
        row = {"layer": part.layer, "tensor": name, "dtype": part.entry.dtype, "format": one.format}
        row |= check_requantised(part, original, self.edits[part.layer].for_tensor(2), self.strength(part.layer))
        self.rows.append(row)
        self.faults += [f"{where}: {what}" for what in (*broken(row), *requantised_faults(row))]

    def missing(self, new: Mapping[str, StoredPart], undo: Mapping[str, Tensor]) -> list[str]:
        """Return a fault for each layer without an edited matrix, and for each that was edited but is not there."""
        kind, names = layout_in(self.folder), {f"inside.{name}" for name in new}
        empty = self.edits.keys() - {part.layer for part in new.values() if not part.form.bias}
        faults = [f"layer {i}: {kind.name_of(i, kind.writes[0], 0)} is missing" for i in sorted(empty)]
        lost = [name.removeprefix("inside.") for name in undo if name.startswith("inside.") and name not in names]
        return faults or [f"{name} was edited, but is missing" for name in sorted(lost)]

    def done(self, note: str | None = None) -> dict[str, Any]:
        """Finish a certificate and return it as a dict."""
        source = None if self.source is None else public_name(self.source)
        return {
            "kind": "certificate",
            "of": {self.kind: shareable(self.folder), "model": source},
            **({} if note is None else {"note": note}),
            **({"remarks": self.remarks} if self.remarks else {}),
            **{key: self.record[key] for key in ("model_id", "strength", "rank", "layers")},
            **{"tensors": self.rows, "faults": self.faults, "environment": environment_record()},
        }


def verify_checkpoint(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict[str, Any]:
    """Certify a baked checkpoint.

    folder: the baked checkpoint.
    source: the original checkpoint, if it is at hand.
    subspace: the subspace file that it should have been baked with. Its edits then replace those stored in the folder.

    For every edited tensor the leak is computed from the file: norm(B^T W' - (1-a) B^T W) / norm(B^T W). It must not
    exceed what rounding causes (`certify.checks.check_tensor`). With `source`, every edited element must be within
    `numerics.bounds.baked_element_bound`, and every other tensor must be byte for byte the original's. What was
    quantised is checked by `certify.quantised`.

    Numerics: float64 from the stored tensors.

    Raises CheckpointError for a folder that is not a baked checkpoint, a subspace that does not fit it, and files that
    cannot be read.
    """
    record = read_provenance(folder)
    certificate = _Certificate.of("baked", folder, source, subspace, record)
    with opened(folder / edits_file(record)) as file:
        undo_tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new, old = certificate.parts("should not have been edited, but differs from the original")
    for name, part in progress(new.items(), total=len(new), desc="verify"):
        if part.quantised is not None or (not is_dequantised(record) and name in old and old[name].quantised):
            certificate.requantised(name, part, old.get(name))
            continue
        layer, after, before, inside = part.layer, read(part), None, undo_tensors.get(f"inside.{name}")
        if name in old:
            before = read(old[name])
            if before.shape != after.shape or (before.dtype != after.dtype and not old[name].quantised):
                certificate.faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
                continue
        elif inside is None:
            missing = "the record of what was removed is missing; give --model to check without it"
            certificate.faults.append(f"layer {layer}: {name}: {missing}")
            continue
        row = {"layer": layer, "tensor": name, "dtype": part.entry.dtype}
        edit = certificate.edits[layer].for_tensor(1 if part.form.bias else 2)
        row |= check_tensor(after, before, inside, edit, certificate.strength(layer))
        certificate.rows.append(row)
        certificate.faults += [f"layer {layer}: {name}: {what}" for what in broken(row)]
    certificate.faults += certificate.missing(new, undo_tensors)
    return certificate.done()


def verify_adapter(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict[str, Any]:
    """Certify the files of an adapter.

    folder: the adapter. source: the original checkpoint, if it is at hand. subspace: as in `verify_checkpoint`.

    B must be exactly the negative basis, the padding of the rank must be zero, and the scaling 1. With `source`, A must
    be within `numerics.bounds.adapter_bound`. "leak_bfloat16" then says how much of what the edit reads is left in an
    engine that rounds A and B to bfloat16.

    Numerics: float64 from the stored tensors.

    Raises CheckpointError for a folder that is not one of our adapters.
    """
    record = read_provenance(folder, "adapter")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        expected_rank = int(record["padded_rank"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{str(folder / CONFIG)!r} is not an adapter configuration ({error}).") from error
    certificate = _Certificate.of("adapter", folder, source, subspace, record)
    expected = configuration(record)
    for key in sorted(config.keys() | expected.keys()):
        if config.get(key) != expected.get(key) or (key in config) != (key in expected):
            certificate.faults.append(f"{CONFIG}: {key} is {config.get(key)!r}, not {expected.get(key)!r}")
    old = {} if source is None else edited_in(source, certificate.edits)
    asked = [part for part in edited_by(record) if part.layer in certificate.edits]
    with opened(folder / WEIGHTS) as file:
        pairs, rest = unpacked({name: file.get_tensor(name) for name in file.keys()}, asked)  # noqa: SIM118
    if unknown := sorted({name for name, part in old.items() if not part.form.bias} - {part.name for part in asked}):
        certificate.faults.append(f"layer {old[unknown[0]].layer}: {unknown[0]} of the original is not edited")
    for part in progress(asked, total=len(asked), desc="verify"):
        layer, module, pair = part.layer, part.name.removesuffix(".weight"), pairs.get(part.name)
        edit = certificate.edits[layer]
        d, k = edit.basis.shape
        if pair is None or k > expected_rank or len(pair[0]) != expected_rank or pair[1].shape != (d, expected_rank):
            certificate.faults.append(f"layer {layer}: {module}: A or B is missing, or of another shape")
            continue
        a, b = pair
        weight = None if part.name not in old else read(old[part.name])
        if source is not None and (weight is None or weight.shape != (d, a.shape[1])):
            certificate.faults += _pair_faults(layer, module, a, b, edit, None)
            shape = (d, a.shape[1])
            certificate.faults.append(f"layer {layer}: {module}: the original has no weight of shape {shape}")
            continue
        row = _pair_row(layer, module, a, b, edit, weight, certificate.strength(layer))
        certificate.rows.append(row)
        certificate.faults += _pair_faults(layer, module, a, b, edit, row)
    certificate.faults += [f"{name} does not belong to a layer of the subspace" for name in sorted(rest)]
    wrong = sum(not row["error_over_bound"] <= 1 for row in certificate.rows if row["error_over_bound"] is not None)
    if 2 * wrong > len(asked):
        certificate.faults.insert(0, f"A of {wrong} of {len(asked)} matrices is wrong: is it another model?")
    unchecked = "A was not checked against the weights: give --model to check it"
    return certificate.done(unchecked if source is None else None)


def _pair_row(
    layer: int, module: str, a: Tensor, b: Tensor, edit: Projection, weight: Tensor | None, strength: float
) -> dict[str, Any]:
    """Return the figures of one adapted layer. Without the original weight, only whether they are finite."""
    dtype = str(a.dtype).removeprefix("torch.")
    row: dict[str, Any] = {"layer": layer, "tensor": f"{module}.lora_A", "dtype": dtype}
    row |= {"error_over_bound": None, "leak_bfloat16": None, "finite": bool(torch.isfinite(a).all())}
    if weight is not None:
        reads = edit.reads.double()
        inside = reads.T @ weight.double()
        error = (a[: reads.shape[1]].double() - strength * inside).abs()
        row["error_over_bound"] = worst_ratio(error, adapter_bound(weight, strength, edit))
        rounded = reads.T @ b.bfloat16().double() @ a.bfloat16().double() + strength * inside
        row["leak_bfloat16"] = float(rounded.norm() / inside.norm())
    return row


def _pair_faults(
    layer: int, module: str, a: Tensor, b: Tensor, edit: Projection, row: dict[str, Any] | None) -> list[str]:
    """Return the faults of one adapted layer. row: its figures, or None."""
    where, k, faults = f"layer {layer}: {module}", edit.basis.shape[1], []
    if not torch.equal(b[:, :k], -edit.basis):
        faults.append(f"{where}: B is not the negative basis")
    if a[k:].any() or b[:, k:].any():
        faults.append(f"{where}: the padding of the rank is not zero")
    if row is None:
        return faults
    if row["error_over_bound"] is not None and not row["error_over_bound"] <= 1:
        faults.append(f"{where}: the error of A is {row['error_over_bound']:.3g} times its bound")
    if not row["finite"]:
        faults.append(f"{where}: A holds NaN or Inf")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        faults.append(f"{where}: A is {a.dtype}, B {b.dtype}; both should be float32")
    return faults


def verify_restored(folder: Path, source: Path | None = None, subspace: Path | None = None) -> dict[str, Any]:
    """Certify a checkpoint whose edit was undone.

    folder: the restored checkpoint. source: the original, if it is at hand. subspace: as in `verify_checkpoint`.

    With `source`, every tensor that was edited must be within `numerics.bounds.undo_bound` of the original, and every
    other tensor byte for byte equal. Without it, only hashes are checked.

    Numerics: float64 from the stored tensors.

    Raises CheckpointError for a folder that is not a restored checkpoint.
    """
    certificate = _Certificate.of("restored", folder, source, subspace, read_provenance(folder, "restored"))
    new, old = certificate.parts("was never edited, but differs from the original")
    for name in progress([name for name in new if name in old], total=len(new), desc="verify"):
        layer = new[name].layer
        restored, weight = read(new[name]), read(old[name])
        if restored.shape != weight.shape or (restored.dtype != weight.dtype and not old[name].quantised):
            certificate.faults.append(f"layer {layer}: {name} has another shape or dtype than the original")
            continue
        edit, strength, worst = certificate.edits[layer], certificate.strength(layer), 0.0
        bias = new[name].form.bias
        for start in range(0, weight.shape[1], 1024):
            block = weight[:, 0] if bias else weight[:, start : start + 1024]
            error = (restored[:, start : start + 1024].double().reshape(block.shape) - block.double()).abs()
            bound = undo_bound(block, bake_weight(block, edit, strength), edit, strength, restored.dtype)
            worst = max(worst, worst_ratio(error, bound))
        row = {"layer": layer, "tensor": name, "dtype": new[name].entry.dtype, "error_over_bound": worst}
        certificate.rows.append(row)
        if not worst <= 1:
            where = f"layer {layer}: {name}"
            certificate.faults.append(f"{where}: an element differs from the original by {worst:.3g} times its bound")
    return certificate.done()
