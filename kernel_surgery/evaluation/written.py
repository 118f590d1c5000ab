"""An edited checkpoint or adapter on disk, to be evaluated beside its original (`eval --baked`, `eval --adapter`)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.certify.quantised import same_bytes
from kernel_surgery.checkpoint.adapter import WEIGHTS, edited_by, unpacked
from kernel_surgery.checkpoint.record import edits_file, read_edits, read_provenance
from kernel_surgery.common.errors import CheckpointError, MismatchError
from kernel_surgery.common.names import PROVENANCE
from kernel_surgery.common.progress import progress
from kernel_surgery.edit.lora import lora_pair
from kernel_surgery.files.contents import DOCUMENT
from kernel_surgery.files.folder import changed_files
from kernel_surgery.files.tensorfile import opened
from kernel_surgery.models.before import check_config
from kernel_surgery.models.stored import layout_in, layouts, located, parts, sampled
from kernel_surgery.subspace.fingerprint import sample_weights
from kernel_surgery.subspace.written import Written


def read_written(folder: Path, kind: str, original: Path) -> Written:
    """Return the edit that a folder holds, with its tensors as they are there.

    kind: "baked" or "adapter". original: the folder of the model that it was made of.

    Raises CheckpointError for a folder of another kind, or changed since it was made, and MismatchError if it was made
    of another model: a tensor that the edit does not concern differs, or the adapter does not follow from the weights.
    """
    record = read_provenance(folder, kind)
    read = {name: digest for name, digest in record["sha256"].items() if not DOCUMENT.fullmatch(name)}
    if faults := changed_files(folder, read, PROVENANCE):
        raise CheckpointError(f"{str(folder)!r} is not as it was made: {faults[0]}. Make it again.")
    check_config(original)
    ours = parts(layout_in(original), layouts(original), record["layers"])
    edits = read_edits(folder, record, edits_file(record))
    tensors = _baked(folder, original, record) if kind == "baked" else _adapter(folder, record)
    made = Written.of(
        edits,
        strengths={int(layer): factor for layer, factor in record.get("schedule", {}).items()},
        site=record["site"],
        model_id=record["model_id"],
        fit=record["fit"],
        fingerprint=sample_weights(sampled(original).items()),
        tensors=tensors,
    )
    if kind == "adapter":
        for part in (part for part in ours if not part.form.bias):
            module, weight, edit = part.name.removesuffix(".weight"), part.mapped(), edits[part.layer]
            held = tensors.get(f"{module}.lora_A")
            if held is None or (len(weight), weight.shape[1]) != (len(edit.basis), held.shape[1]):
                raise MismatchError(f"{str(folder)!r} was made of another model: {module} has another shape. {_NEXT}")
            a = lora_pair(weight, edit, made.strength_at(part.layer, record["strength"])).a
            held = held[: len(a)]
            if not torch.allclose(a, held, rtol=1e-3, atol=1e-3 * float(a.abs().max())):
                raise MismatchError(f"{str(folder)!r} was made of another model: {module} has other weights. {_NEXT}")
    return made


_NEXT = "Name the original that it was made of with --model."


def _baked(folder: Path, original: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the edited parameters of a baked checkpoint. Raises MismatchError if another tensor differs."""
    one, other = located(folder), located(original)
    if one.keys() != other.keys():
        raise MismatchError(f"{str(folder)!r} was made of another model: its tensors have other names. {_NEXT}")
    edited = parts(layout_in(original), layouts(folder), record["layers"])
    changed = {name for part in edited for name in part.tensors}
    for name in progress(one, total=len(one), desc="compare"):
        shapes = one[name][1].shape, other[name][1].shape
        if shapes[0] != shapes[1] or (name not in changed and not same_bytes(one[name], other[name])):
            raise MismatchError(f"{str(folder)!r} was made of another model: {name} differs. {_NEXT}")
    return {part.name: part.mapped().clone() for part in edited}


def _adapter(folder: Path, record: dict[str, Any]) -> dict[str, Tensor]:
    """Return the factors of an adapter. record: its provenance. Raises CheckpointError if one is missing."""
    asked = edited_by(record)
    with opened(folder / WEIGHTS) as file:
        pairs, _ = unpacked({name: file.get_tensor(name) for name in file.keys()}, asked)  # noqa: SIM118
    tensors = dict[str, Tensor]()
    for part in asked:
        site = part.name.removesuffix(".weight")
        if part.name not in pairs:
            raise CheckpointError(f"{str(folder / WEIGHTS)!r} has no pair of {site}. Make the adapter again.")
        tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"] = pairs[part.name]
    return tensors
