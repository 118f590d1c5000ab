"""The record that lies beside a baked checkpoint, a restored checkpoint or an adapter.

`provenance.json` says what was done, to which model, with which subspace, and holds the SHA-256 of every file. The
bases are stored beside it, so that the folder can be checked without any other file.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.files.contents import OURS, PROVENANCE
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.tensorfile import opened, save_tensors
from kernel_surgery.models.load import hub_id, public_name
from kernel_surgery.subspace.artifact import Subspace, check_bases

BASES = Path(OURS) / "subspace.safetensors"


def write_bases(folder: Path, bases: dict[int, torch.Tensor]) -> None:
    """Store the bases in the folder, so that it can be checked without the subspace file."""
    (folder / BASES).parent.mkdir(exist_ok=True)
    save_tensors({f"basis.{layer}": basis.contiguous() for layer, basis in bases.items()}, folder / BASES, {})


def read_bases(folder: Path, record: dict[str, Any], file: Path = BASES) -> dict[int, torch.Tensor]:
    """Return the bases {layer: U [d_model, k]} that are stored in a folder.

    Raises CheckpointError unless they are orthonormal and have the layers and the rank that the record names.
    """
    with opened(folder / file) as tensors:
        named = {name: re.fullmatch(r"basis\.(\d+)", name) for name in tensors.keys()}  # noqa: SIM118
        bases = {int(match[1]): tensors.get_tensor(name) for name, match in named.items() if match}
    try:
        bases = check_bases(bases)
    except ValueError as error:
        raise CheckpointError(f"{str(folder / file)!r}: {error}") from error
    ranks = {basis.shape[1] for basis in bases.values()}
    if sorted(bases) != sorted(record["layers"]) or ranks != {record["rank"]}:
        raise CheckpointError(
            f"{str(folder / file)!r} holds bases of layers {sorted(bases)}, rank {min(ranks)}, but {PROVENANCE} says "
            f"layers {record['layers']}, rank {record['rank']}."
        )
    return bases


def edit_record(
    kind: str,
    source: Path,
    subspace: Subspace,
    strength: float,
    model_id: str | None,
    command: str | None,
    padded_rank: int | None = None,
) -> dict[str, Any]:
    """Return the fields that every record of an edit has: the model, the subspace and the strength.

    kind: "baked" or "adapter". padded_rank: of an adapter.
    """
    # In the hub's cache the folder's name is the commit. Otherwise take the commit that the subspace was measured on.
    revision = source.name if source.parent.name == "snapshots" else subspace.revision
    return {
        **{"kind": kind, "model_id": public_name(model_id or source), "strength": strength},
        **{"layers": list(subspace.layers), "rank": subspace.rank},
        **({} if padded_rank is None else {"padded_rank": padded_rank}),
        **{"site": subspace.site, "revision": revision, "note": subspace.note, "fit": subspace.fit},
        "command": command,
    }


def base_model_line(record: dict[str, Any]) -> list[str]:
    """Return the line of a card's header that names the base model: only a hub id means the same elsewhere."""
    base = hub_id(record["model_id"])
    return [f"base_model: {json.dumps(base)}"] if base else []


def write_provenance(folder: Path, record: dict[str, Any], hashes: dict[str, str]) -> None:
    """Write provenance.json: the record, the environment, and the SHA-256 of every file in the folder.

    hashes: the hashes that are already known. The others are added to it.
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in hashes:
            hashes[name] = sha256(file)
    record = record | {"sha256": dict(sorted(hashes.items())), "environment": environment_record()}
    write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


_WRITER = {
    "baked": ("a checkpoint", "kernel_surgery.bake"),
    "restored": ("a checkpoint", "kernel_surgery.bake --undo"),
    "adapter": ("an adapter", "kernel_surgery.lora"),
}


def read_provenance(folder: Path, kind: str = "baked") -> dict[str, Any]:
    """Return the record of a folder. kind: "baked", "restored" or "adapter".

    Raises CheckpointError if the folder has no valid record of that kind.
    """
    try:
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        if record["kind"] != kind or not isinstance(record["sha256"], dict):
            raise CheckpointError(f"it is of a {record['kind']!r} checkpoint")
        if not math.isfinite(float(record["strength"])) or not record["layers"] or int(record["rank"]) < 1:
            raise CheckpointError("it names no strength, layers or rank")
        if not isinstance(record["model_id"], str) or not all(isinstance(i, int) for i in record["layers"]):
            raise CheckpointError("it names no model or layers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, writer = _WRITER[kind]
        raise CheckpointError(
            f"{str(folder)!r} is not {what} from python -m {writer}: its {PROVENANCE} is missing or of another kind."
        ) from error
    return record
