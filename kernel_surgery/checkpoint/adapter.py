"""The edit as a LoRA adapter on disk, in PEFT's format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.checkpoint.record import (
    base_model_line,
    damage_lines,
    edit_record,
    write_edits,
    write_provenance,
)
from kernel_surgery.checkpoint.source import check_parts, check_source, editable, original_layouts, refuse_after_norm
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import check_output, write_atomic
from kernel_surgery.common.progress import progress
from kernel_surgery.edit.lora import lora_pair, padded_rank, refuse_offset
from kernel_surgery.files.folder import new_folder
from kernel_surgery.files.tensorfile import save_tensors
from kernel_surgery.models.load import hub_id
from kernel_surgery.models.stored import layout_in
from kernel_surgery.subspace.artifact import Subspace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT puts this before a module's name


def write_adapter(
    source: Path,
    subspace: Subspace,
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
    command: str | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
) -> int:
    """Write the edit of the checkpoint `source` as an adapter to the new folder `destination`. Return its rank.

    source: folder of a checkpoint that was not baked.
    subspace: its edits; the edited layers are its layers.
    strength: a in A = a B_e^T W, B = -A_e, with the edit's basis A_e and dual B_e. The schedule multiplies it.
    model_id: name of the base model for the records, by default the folder.
    force: accept a subspace of unknown origin, or one fitted on another model.
    command: the command line, for the record.
    measure: called after all checks, before anything is written. It returns the damage for the record and the card
    (`damage.before`); what it raises leaves nothing behind.

    The rank is the subspace's, padded with zeros to one that serving engines accept (`edit.lora.padded_rank`). One
    weight is in memory at a time.

    Numerics: as in `edit.lora.lora_pair`; A and B are stored in float32.

    Raises what `checkpoint.source.check_source` raises, and FileExistsError if `destination` exists. Raises
    KernelSurgeryError for an offset, a bias that is not zero, a rank that no engine takes, a source that was baked, a
    weight that is not finite, and files that cannot be read or written. After any exception `destination` does not
    exist.
    """
    source, destination = Path(source), Path(destination)
    rank, edits = padded_rank(subspace.rank), subspace.projections
    refuse_offset(next(iter(edits.values())))
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    refuse_after_norm(subspace, ["lora"])
    kind, tensors = layout_in(source), {}
    found = editable(source, layouts, subspace.bases, "read")
    check_parts(kind, found, edits, ["lora"])
    matrices = [part for part in found if not part.form.bias]
    check_output(destination, size=sum(4 * rank * sum(part.entry.shape) for part in matrices))
    damage = measure() if measure else None
    for part in progress(matrices, total=len(matrices), desc=destination.name):
        pair = lora_pair(part.read(), edits[part.layer], subspace.strength_at(part.layer, strength))
        # A NaN or Inf in a column of W makes the whole column of A NaN or Inf, so checking A is enough.
        if not torch.isfinite(pair.a).all():
            raise CheckpointError(
                f"cannot write an adapter: {part.name} holds NaN or Inf, or strength {strength:g} is too large for it."
            )
        padding = rank - subspace.rank
        module = PREFIX + part.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(pair.a, (0, 0, 0, padding)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(pair.b, (0, padding)).contiguous()
    record = edit_record("adapter", source, subspace, strength, model_id, command, padded_rank=rank, damage=damage)
    # PEFT can load the base model by this name. Only a hub id means the same on another machine.
    record["base"] = hub_id(model_id or source)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(destination, size) as folder:
        save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_edits(folder, edits)
        write_atomic(folder / CONFIG, json.dumps(configuration(record), indent=2) + "\n")
        write_atomic(folder / "README.md", _card(record))
        write_provenance(folder, record, {})
    return rank


def configuration(record: dict[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json as a dict, in the form that PEFT reads.

    Every field that changes PEFT's arithmetic is set explicitly, so that no default of PEFT matters. record: the
    provenance, with "padded_rank", "layers" and "base" (hub id of the base model, or None).
    """
    rank = record["padded_rank"]
    return {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": record["base"]},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False},
        **{"target_modules": ["down_proj"], "layers_to_transform": record["layers"], "layers_pattern": "layers"},
        **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None},
    }


def _card(record: dict[str, Any]) -> str:
    """Return the model card, which says what the adapter does."""
    model, layers = record["model_id"], record["layers"]
    lines = [
        *("---", *base_model_line(record), "library_name: peft", "tags: [kernel-surgery, lora]", "---", ""),
        *(f"# {Path(model).name}, language subspace removed: an adapter", "", *damage_lines(record)),
        f"This adapter edits layers {layers[0]} to {layers[-1]} ({len(layers)} in all) of {model}. There W of",
        f"`mlp.down_proj` acts as W - a U (U^T W), with U of rank {record['rank']} and a = {record['strength']:g}.",
        "U spans the language subspace: the directions in which activations of one problem differ between languages.",
        "",
        "A = a B_e^T W and B = -A_e, with the edit's basis A_e and dual B_e (both U for an orthogonal edit).",
        f"Both are padded with zeros to rank {record['padded_rank']}. alpha = r, so the scaling is 1.",
        "Nothing was trained. The tensors are float32. An engine that rounds them to bfloat16 leaves",
        "about 2^-9 of the part that the edit removes.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        "`provenance.json` records the SHA-256 of every file and how the subspace was fitted.",
    ]
    return "\n".join(lines) + "\n"
