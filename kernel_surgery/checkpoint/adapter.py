"""The edit as a LoRA adapter on disk, in PEFT's format."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from kernel_surgery.checkpoint.record import edit_record, write_bases, write_provenance
from kernel_surgery.checkpoint.source import check_source, editable, original_layouts
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.progress import progress
from kernel_surgery.edit.lora import lora_pair, padded_rank, refuse_bias
from kernel_surgery.files.folder import check_absent, new_folder
from kernel_surgery.files.tensorfile import read_tensor
from kernel_surgery.models.architectures import LLAMA
from kernel_surgery.subspace.artifact import Subspace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before a module's name


def write_adapter(
    source: Path,
    subspace: Subspace,
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
    command: str | None = None,
) -> int:
    """Write the adapter of the checkpoint `source` to the new folder `destination`; its rank.

    One weight in memory at a time. Raises what `checkpoint.check_source` raises, FileExistsError if `destination`
    exists, ValueError for a bias that is not zero, a rank that no engine takes, a source that was baked, and for
    what cannot be read or written; on any exception `destination` does not exist.
    """
    source, destination = Path(source), Path(destination)
    check_absent(destination)
    rank = padded_rank(subspace.rank)
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    files = {name: layout.path for layout in layouts for name in layout.entries}
    tensors = {}
    found = editable(layouts, subspace.bases)
    for entry in progress(found, total=len(found), desc=destination.name):
        with files[entry.name].open("rb") as file:
            weight = read_tensor(file.fileno(), entry)
        if weight.ndim == 1:
            refuse_bias(entry.name.removesuffix(".bias"), weight)
            continue
        basis = subspace.bases[LLAMA.edited_layer(entry.name, subspace.bases)]
        pair = lora_pair(weight, basis, strength)
        # One NaN or Inf in a column makes all of that column's A NaN or Inf.
        if not torch.isfinite(pair.a).all():
            raise CheckpointError(f"{entry.name} holds NaN or Inf. Nothing was written.")
        missing = rank - subspace.rank
        module = PREFIX + entry.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(pair.a, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(pair.b, (0, missing)).contiguous()
    record = edit_record("adapter", source, subspace, strength, model_id, command) | {"padded_rank": rank}
    # PEFT looks the base model up under this name: a folder by its path, whatever it was called on the command line.
    is_id = model_id is not None and not Path(model_id).exists() and model_id != "polyglot"
    record["base"] = model_id if is_id else str(source.resolve())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(destination, size) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_bases(folder, dict(subspace.bases))
        write_atomic(folder / CONFIG, json.dumps(configuration(record), indent=2) + "\n")
        write_atomic(folder / "README.md", _card(record))
        write_provenance(folder, record, {})
    return rank


def configuration(record: dict) -> dict:
    """The adapter's configuration, as PEFT reads it: every field that changes what it computes is spelled out."""
    rank = record["padded_rank"]
    return {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": record["base"]},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False},
        **{"target_modules": ["down_proj"], "layers_to_transform": record["layers"], "layers_pattern": "layers"},
        **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None},
    }


def _card(record: dict) -> str:
    """A model card: what the adapter does, and what it does not."""
    model, layers = record["model_id"], record["layers"]
    lines = [
        *("---", f"base_model: {json.dumps(model)}", "library_name: peft", "tags: [kernel-surgery, lora]", "---", ""),
        *(f"# {Path(model).name}, language subspace removed: an adapter", ""),
        f"In layers {layers[0]} to {layers[-1]} ({len(layers)} in all) of {model} this adapter makes W of",
        f"`mlp.down_proj` act as W - a U (U^T W), with U of rank {record['rank']} and a = {record['strength']:g}:",
        f"A = a U^T W, B = -U, filled up with zeros to rank {record['padded_rank']}; alpha = r, so the scaling is 1.",
        "Nothing was trained. The tensors are float32: an engine that rounds them to bfloat16 leaves",
        "about 2^-9 of what the edit removes.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        "`provenance.json` has the SHA-256 of every file and says how the subspace was found.",
    ]
    return "\n".join(lines) + "\n"
