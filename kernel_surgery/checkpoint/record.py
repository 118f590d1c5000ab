"""The record that lies beside a baked checkpoint, a restored checkpoint or an adapter.

`provenance.json` says what was done, to which model, with which subspace, and holds the SHA-256 of every file. The
tensors of the edit are stored beside it, so that the folder can be checked without any other file.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import CheckpointError, MissingFileError, UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.names import PROVENANCE, VERSION
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.damage.words import BITS4
from kernel_surgery.files.contents import OURS
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.tensorfile import opened, save_tensors
from kernel_surgery.models.load import hub_id, public_name
from kernel_surgery.models.stored import layout_in
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace, check_projections

# In a subfolder, because some engines load every *.safetensors beside the weights.
BASES = Path(OURS) / "subspace.safetensors"
UNDO = Path(OURS) / "undo.safetensors"
BASE_CARD = "README.base.md"
LICENCE = ("license", "license_name", "license_link")  # in the header of a card on the hub


def edit_tensors(edits: Mapping[int, Projection]) -> dict[str, torch.Tensor]:
    """Return the tensors of an edit by their names in our files: basis.N, dual.N and offset.N of layer N."""
    named = {
        f"{part}.{layer}": getattr(edit, part) for layer, edit in edits.items() for part in ("basis", "dual", "offset")
    }
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def edits_in(tensors: Mapping[str, torch.Tensor]) -> dict[int, Projection]:
    """Return the edit of every layer from the tensors of a file, by their names (`edit_tensors`).

    Raises SubspaceError for tensors that make no edit.
    """
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(basis|dual|offset)\.(\d+)", name):
            parts.setdefault(int(match[2]), {})[match[1]] = tensor
    return check_projections({layer: Projection(**own) for layer, own in parts.items() if "basis" in own})


def write_edits(folder: Path, edits: Mapping[int, Projection]) -> None:
    """Store the tensors of the edit in the folder, so that it can be checked without the subspace file."""
    (folder / BASES).parent.mkdir(exist_ok=True)
    save_tensors(edit_tensors(edits), folder / BASES, {})


def read_edits(folder: Path, record: dict[str, Any], file: Path = BASES) -> dict[int, Projection]:
    """Return the edit of every layer that is stored in a folder.

    Raises CheckpointError unless they are edits and have the layers and the rank that the record names, and
    MissingFileError if the file is not there.
    """
    if not (folder / file).is_file():
        raise MissingFileError(
            f"{str(folder)!r} is incomplete: {file.as_posix()}, which holds the edit, is missing. Fetch it again."
        )
    with opened(folder / file) as tensors:
        held = {name: tensors.get_tensor(name) for name in tensors.keys() if "inside" not in name}  # noqa: SIM118
    try:
        edits = edits_in(held)
    except ValueError as error:
        raise CheckpointError(f"{str(folder / file)!r}: {error}") from error
    ranks = {edit.basis.shape[1] for edit in edits.values()}
    if sorted(edits) != sorted(record["layers"]) or ranks != {record["rank"]}:
        raise CheckpointError(
            f"{str(folder / file)!r} holds bases of layers {sorted(edits)}, rank {min(ranks)}, but {PROVENANCE} says "
            f"layers {record['layers']}, rank {record['rank']}."
        )
    return edits


def strength_at(record: dict[str, Any], layer: int) -> float:
    """Return the strength of one layer, from a record with its schedule."""
    return float(record["strength"]) * float(record.get("schedule", {}).get(str(layer), 1.0))


def edit_record(
    kind: str,
    source: Path,
    subspace: Subspace,
    strength: float,
    model_id: str | None,
    command: str | None,
    *,
    base: str | None = None,
    doubt: str | None = None,
    padded_rank: int | None = None,
    damage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the fields that every record of an edit has: the model, the subspace and the strength.

    kind: "baked" or "adapter". base: the original's hub id, by default that of `model_id` or `source`. doubt: why the
    subspace may not belong to these weights, if it was forced on them. padded_rank: of an adapter. damage: what was
    measured of it, with "in_words".
    """
    # In the hub's cache the folder's name is the commit. Otherwise take the commit that the subspace was measured on.
    revision = source.name if source.parent.name == "snapshots" else subspace.revision
    return {
        **{"kind": kind, "model_id": public_name(model_id or source), "base": base or hub_id(model_id or source)},
        "strength": strength,
        **({"schedule": {str(i): a for i, a in subspace.strengths.items()}} if subspace.strengths else {}),
        **{"layers": list(subspace.layers), "rank": subspace.rank, "form": subspace.form},
        **({} if padded_rank is None else {"padded_rank": padded_rank}),
        **{"site": subspace.site, "revision": revision, "note": subspace.note_on(layout_in(source))},
        **{"fit": subspace.fit, "fitted_on": subspace.model_id},
        **({} if doubt is None else {"forced": doubt}),
        **({"licence": licence} if (licence := licence_of(source)) else {}),
        **({} if damage is None else {"damage": damage}),
        "command": command,
    }


def damage_lines(record: dict[str, Any]) -> list[str]:
    """Return the first lines of a card's text: what the edit did to the model."""
    damage = record.get("damage", {})
    words = damage.get("in_words", "damage: not measured")
    lines = [f"**{words[0].upper()}{words[1:]}.**", ""]
    if forced := forced_note(record):
        lines += [f"**{forced}**", ""]
    if damage.get("neutral"):
        names = list(next(iter(damage["neutral"].values())))
        languages = f"each of {', '.join(names)}" if len(names) > 1 else names[0]
        lines += [
            f"KL is KL(original || edited) at every token, measured in {measured_in(damage)}. It is compared with that",
            "of rounding this model's own weights to the nearest, without calibration; calibrated formats are made to",
            "cost less, and were not measured.",
            '"like 4-bit" is at most 1.5 times as much as 4 bits cost, "like 8-bit" at most 1.5 times as 8 bits do.'
            + _beside_4_bits(damage),
            f"The text is {damage['sentences']} plain everyday sentences in {languages}. In other languages",
            "and in chats it may be more. That directions were removed does not mean that the model's language cannot",
            "be read any more.",
            "",
        ]
    return lines


def measured_in(damage: dict[str, Any]) -> str:
    """Return the precision in which a damage was measured, from the yardstick of the other one."""
    return "float32" if damage["precision"] == "bfloat16" else "16 bits"


def _beside_4_bits(damage: dict[str, Any]) -> str:
    """Return the sentence of a card with the ratios of an edit's damage to that of 4-bit weights, or nothing."""
    words = (by for verdict in damage["verdict"].values() for by in verdict["languages"].values())
    ratios = sorted(by["ratios"][BITS4][0] for by in words if BITS4 in by["ratios"])
    ends = list(dict.fromkeys(f"{ratio:.2g}" for ratio in ratios[:1] + ratios[-1:]))
    return f" Here it is {' to '.join(ends)} times what 4 bits cost." if ends else ""


def forced_note(record: dict[str, Any]) -> str | None:
    """Return the sentence on a subspace that was forced on these weights, or None."""
    if "forced" not in record:
        return None
    fitted = f"fitted on {record['fitted_on']}" if record.get("fitted_on") else "of unknown origin"
    return f"The subspace is {fitted}, and was forced on these weights: it {record['forced']}."


def check_base(base: str | None) -> None:
    """Raise UserError for a name of the original, for cards and PEFT, that is not a hub id."""
    if base is not None and hub_id(base) is None:
        raise UserError(f"--base-model must be a hub id such as Qwen/Qwen2.5-3B, got {base!r}.")


def licence_of(source: Path) -> dict[str, str]:
    """Return what the header of a model's card says of its licence, as it stands there. {} if it says nothing."""
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        held = metadata_load(source / "README.md") or {}
    except (OSError, ValueError, YAMLError):  # no card, or none that can be read: then nothing is known
        return {}
    return {key: held[key] for key in LICENCE if isinstance(held.get(key), str)}


def header_lines(record: dict[str, Any]) -> list[str]:
    """Return the lines of a card's header about the original: its name and its licence.

    Only a hub id means the same elsewhere, so a folder's name is left out.
    """
    base = record.get("base") or hub_id(record["model_id"])
    known = ({"base_model": base} if base else {}) | record.get("licence", {})
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items()]


def title_of(record: dict[str, Any]) -> str:
    """Return what a card's title says of the edit: at strength 1 everywhere the subspace is removed."""
    whole = all(strength_at(record, layer) == 1 for layer in record["layers"])
    return "language subspace removed" if whole else f"language subspace edited at strength {record['strength']:g}"


def checked_by(options: str, *, needed: bool) -> list[str]:
    """Return the lines of a card on how to check the folder. needed: whether that takes the original."""
    more = " --model ORIGINAL" if needed else ""
    without = "" if needed else " With `--model ORIGINAL` every element is held to its bound, too."
    return [
        f"The Python package kernel_surgery {VERSION} checks a downloaded copy of this folder, THIS. ORIGINAL is the",
        f"model that it was made of, a hub id or a folder.{without}",
        "",
        f"    python -m kernel_surgery.verify {options}{more}",
        "",
    ]


def by_layer(record: dict[str, Any]) -> str:
    """Return what a card says after the strength, if a schedule multiplies it."""
    return f", in each layer times its factor in `{PROVENANCE}` (`schedule`)" if record.get("schedule") else ""


def spans(record: dict[str, Any], written: str, read: str) -> list[str]:
    """Return the line of a card that says what the edit's factors are."""
    if record["form"] == "orthogonal":
        about = "activations of one problem differ between languages"
        return [f"{written} spans the language subspace: the directions in which {about}."]
    return [f"{read} reads what the languages' means tell of the language, and {written} is what the edit changes."]


def write_provenance(folder: Path, record: dict[str, Any], hashes: dict[str, str]) -> None:
    """Write provenance.json: the record, the environment, and the SHA-256 of every file in the folder.

    hashes: the hashes that are already known. The others are added to it.
    """
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    missing = {name: file for name, file in files.items() if name not in hashes}
    total = sum(file.stat().st_size for file in missing.values())
    with progress_bar(total, "hash", unit="B", unit_scale=True, leave=False) as bar:
        for name, file in missing.items():
            hashes[name] = sha256(file, bar.update)
    record = record | {"sha256": dict(sorted(hashes.items())), "environment": environment_record()}
    write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def is_restored(folder: Path) -> bool:
    """Return whether a folder holds what `bake --undo` wrote."""
    return _kind_of(folder) == "restored"


def _kind_of(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_requantised(record: dict[str, Any]) -> bool:
    """Return whether a baked checkpoint's edited matrices were quantised again. Then it keeps nothing to undo them."""
    return dict(record.get("quantisation") or {}).get("how") == "requantised"


def edits_file(record: dict[str, Any]) -> Path:
    """Return the file of a folder that holds the tensors of its edit. record: of the folder."""
    return UNDO if record["kind"] == "baked" and not is_requantised(record) else BASES


def is_dequantised(record: dict[str, Any]) -> bool:
    """Return whether a baked checkpoint was written as bfloat16 from quantised weights."""
    return dict(record.get("quantisation") or {}).get("how") == "dequantised"


_WRITER = {
    "baked": ("a checkpoint", "kernel_surgery.bake"),
    "restored": ("a checkpoint", "kernel_surgery.bake --undo"),
    "adapter": ("an adapter", "kernel_surgery.lora"),
}


def _written_by(kind: str) -> str:
    what, writer = _WRITER[kind]
    return f"{what} from python -m {writer}"


def read_provenance(folder: Path, kind: str = "baked") -> dict[str, Any]:
    """Return the record of a folder. kind: "baked", "restored" or "adapter".

    Raises CheckpointError if the folder has no valid record of that kind.
    """
    found = _kind_of(folder)
    if found in _WRITER and found != kind:
        raise CheckpointError(
            f"{str(folder)!r} is {_written_by(found)}, not {_written_by(kind)}. verify takes it as --{found}."
        )
    try:
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        if record["kind"] != kind or not isinstance(record["sha256"], dict):
            raise ValueError(f"it is of a {record['kind']!r} checkpoint")
        strengths = [strength_at(record, layer) for layer in record["layers"]]
        if not strengths or not all(map(math.isfinite, strengths)) or int(record["rank"]) < 1:
            raise ValueError("it names no strength, layers or rank")
        if not isinstance(record["model_id"], str) or not all(isinstance(i, int) for i in record["layers"]):
            raise ValueError("it names no model or layers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is not {_written_by(kind)}: its {PROVENANCE} is missing or of another kind."
        ) from error
    return record
