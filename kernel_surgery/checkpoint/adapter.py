"""The edit as a LoRA adapter on disk, in PEFT's format.

A linear module has the pair "{module}.lora_A.weight" [r, d_ff] and "{module}.lora_B.weight" [d_model, r]. What writes
into the MLP block's output comes from the table of architectures, and experts follow the names of the model's files:

    one by one    a pair for every expert, under the name of its matrix in the files. vLLM takes it so, and PEFT, which
                  stacks the experts as transformers does with the matrices.
    stacked       one pair "....experts", A [experts r, d_ff] and B [d_model, r experts]: PEFT's form for a parameter
                  that holds all experts, in which column e of each r is expert e's. It is used if the files hold the
                  experts so, or if the table says that PEFT and vLLM take no other (`Layout.stacked_adapter`).

vLLM only loads experts whose gate and up projections have a pair too. Those are zero, of rank 1; PEFT skips them.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_surgery.checkpoint.record import (
    BASE_CARD,
    by_layer,
    check_base,
    checked_by,
    damage_lines,
    edit_record,
    header_lines,
    spans,
    title_of,
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
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.models.load import read_config
from kernel_surgery.models.stored import StoredPart, layout_in
from kernel_surgery.models.table import Layout, Part
from kernel_surgery.subspace.artifact import Subspace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXPERTS = "experts"  # vLLM's and transformers' name of the module that holds all of a layer
PREFIX = "base_model.model."  # PEFT puts this before a module's name
# {an expert's matrix that writes the output: those that write its input}.
_INPUTS = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}
_STACKED_INPUT = "base_layer"  # PEFT puts gate_up_proj, if it is stacked, there beside down_proj


def write_adapter(
    source: Path,
    subspace: Subspace,
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    base: str | None = None,
    force: bool = False,
    command: str | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
) -> int:
    """Write the edit of the checkpoint `source` as an adapter to the new folder `destination`. Return its rank.

    source: folder of a checkpoint that was not baked.
    subspace: its edits; the edited layers are its layers.
    strength: a in A = a B_e^T W, B = -A_e, with the edit's basis A_e and dual B_e. The schedule multiplies it.
    model_id: name of the base model for the records, by default the folder. base: its hub id, if that is another name.
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
    check_base(base)
    rank, edits = padded_rank(subspace.rank), subspace.projections
    refuse_offset(next(iter(edits.values())))
    layouts = original_layouts(source)
    doubt = check_source(source, layouts, subspace, force=force)
    refuse_after_norm(subspace, ["lora"])
    kind, pairs = layout_in(source), {}
    found = editable(source, layouts, subspace.bases, "read")
    check_parts(kind, found, edits, ["lora"])
    matrices = [part for part in found if not part.form.bias]
    _refuse_transposed(matrices)
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
        pairs[part.name] = (
            torch.nn.functional.pad(pair.a, (0, 0, 0, padding)).contiguous(),
            torch.nn.functional.pad(pair.b, (0, padding)).contiguous(),
        )
    own = ("adapter", source, subspace, strength, model_id, command)
    record = edit_record(*own, base=base, doubt=doubt, padded_rank=rank, damage=damage)
    record |= {"model_type": read_config(source)["model_type"], **_edited(kind, matrices)}
    tensors = packed(edited_by(record), pairs)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(destination, size) as folder:
        save_tensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_edits(folder, edits)
        write_atomic(folder / CONFIG, json.dumps(configuration(record), indent=2) + "\n")
        write_atomic(folder / "README.md", _card(record))
        if (source / "README.md").is_file():
            shutil.copyfile(source / "README.md", folder / BASE_CARD)
        write_provenance(folder, record, {})
    return rank


def _refuse_transposed(parts: Iterable[StoredPart]) -> None:
    """Refuse experts that are stacked as [d_ff, d_model]. PEFT would take one for [d_model, d_ff]."""
    for part in parts:
        if part.form.stacked and part.form.transposed:
            raise CheckpointError(
                f"cannot write an adapter: {part.name} is stacked as [d_ff, d_model], which PEFT takes for its "
                "transpose. Use bake, or the mode fused (vLLM: the plugin)."
            )


@dataclass(frozen=True)
class Edited(Part):
    """A matrix that an adapter edits. tensor: the name of the tensor that holds it in the model's files."""

    tensor: str


def _edited(kind: Layout, parts: Iterable[StoredPart]) -> dict[str, Any]:
    """Return what a record says of the matrices that are edited, from which `edited_by` lists them.

    {"edited": their names in memory, experts without their number, "experts": how many there are of each, "stacked":
    whether they have one pair for all}
    """
    numbers = Counter(part.name.partition("[")[0] for part in parts)
    experts = [part for part in parts if part.form.role == "expert"]
    if not experts:
        return {"edited": list(numbers)}
    stacked = experts[0].form.stacked or kind.stacked_adapter
    return {"edited": list(numbers), "experts": max(numbers.values()), "stacked": stacked}


def edited_by(record: dict[str, Any]) -> list[Edited]:
    """Return the matrices that an adapter edits, experts in their order. record: its provenance.

    Raises ModelError for a model type that is not in the table.
    """
    kind, found = layout_named(record.get("model_type", "llama")), list[Edited]()
    # Records from before there were other matrices than that of mlp.down_proj do not name them.
    for name in record.get("edited") or [f"{kind.site_name(layer)}.weight" for layer in record["layers"]]:
        layer, form, _ = kind.stored(name, record["layers"]) or (0, kind.writes[0], None)
        if form.role != "expert":
            found.append(Edited(layer, name, form, name))
            continue
        alone = next((file for file in kind.files if "*" in file.path and not record["stacked"]), None)
        for expert in range(record["experts"]):
            path = name if alone is None else f"{kind.layer(layer)}.{alone.path.replace('*', str(expert))}"
            found.append(Edited(layer, f"{name}[{expert}]", form if alone is None else alone, path))
    return found


def module_of(part: Edited) -> str:
    """Return the module that has the pair of a matrix. Stacked experts have one for all of them."""
    if part.form.stacked:
        return part.name.partition("[")[0].rpartition(".")[0]
    name = part.tensor if part.form.role == "expert" else part.name
    return name.removesuffix(".weight")


def _inputs(module: str, part: Edited) -> list[str]:
    """Return the modules beside that of an expert's pair, which have a zero pair."""
    if part.form.role != "expert":
        return []
    experts, _, last = module.rpartition(".")
    return [f"{module}.{_STACKED_INPUT}"] if part.form.stacked else [f"{experts}.{name}" for name in _INPUTS[last]]


def packed(parts: Iterable[Edited], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file.

    parts: the matrices that it edits, experts in their order. pairs: {name of a part: A [r, d_ff], B [d_model, r]}.
    """
    tensors, stacks = dict[str, Tensor](), dict[str, list[tuple[Tensor, Tensor]]]()

    def keep(module: str, a: Tensor, b: Tensor) -> None:
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b

    for part in parts:
        a, b = pairs[part.name]
        if part.form.stacked:
            stacks.setdefault(module_of(part), []).append((a, b))
            continue
        keep(module_of(part), a, b)
        for module in _inputs(module_of(part), part):
            keep(module, a.new_zeros(1, b.shape[0]), b.new_zeros(a.shape[1], 1))
    for module, held in stacks.items():
        a, b = torch.cat([a for a, _ in held]), torch.stack([b for _, b in held], -1)
        keep(module, a, b.flatten(1))
        inside = a.new_zeros(len(held), b.shape[0]), b.new_zeros(2 * a.shape[1], len(held))
        keep(f"{module}.{_STACKED_INPUT}", *inside)
    return tensors


def unpacked(
    tensors: Mapping[str, Tensor], parts: Iterable[Edited]
) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
    """Return {name of a part: A [r, d_ff], B [d_model, r]} of the parts whose pair is there, and what else is there.

    The inverse of `packed`. tensors: of an adapter's file. An expert's pair is there if the zero pairs beside it are,
    which count as something else if they are not zero.
    """
    pairs, rest = dict[str, tuple[Tensor, Tensor]](), set(tensors)
    numbers = dict[str, list[Edited]]()
    for part in parts:
        numbers.setdefault(module_of(part), []).append(part)
    for module, held in numbers.items():
        names = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
        zero = {f"{PREFIX}{name}.lora_{letter}.weight" for name in _inputs(module, held[0]) for letter in "AB"}
        rest -= {*names, *(name for name in zero & rest if not tensors[name].any())}
        if not {*names, *zero} <= set(tensors):
            continue
        a, b = (tensors[name] for name in names)
        if len(held) == 1 and not held[0].form.stacked:
            pairs[held[0].name] = (a, b)
        elif len(a) % len(held) == 0 and b.ndim == 2 and b.shape[1] == len(a):
            each = zip(held, a.chunk(len(held)), b.unflatten(1, (-1, len(held))).unbind(-1), strict=True)
            pairs |= {part.name: (one, other) for part, one, other in each}
    return pairs, rest


def _targets(record: dict[str, Any]) -> dict[str, Any]:
    """Return what an adapter targets, in the fields of PEFT's configuration.

    With experts, whose matrices are no module's, everything is targeted as a parameter, each by its whole name: PEFT
    knows no layers of parameters.
    """
    kind, parts = layout_named(record.get("model_type", "llama")), edited_by(record)
    if any(part.form.role == "expert" for part in parts):
        return {"target_modules": [], "target_parameters": record["edited"], "fan_in_fan_out": False}
    transposed = any(part.form.transposed for part in parts)
    paths = dict.fromkeys(part.form.path.removesuffix(".weight") for part in parts)
    # GPT-2's attention has a c_proj too, so there the name says of what it is.
    names = list(dict.fromkeys(path if transposed else path.rpartition(".")[2] for path in paths))
    pattern = kind.layers.rpartition(".")[2]
    layers = {"layers_to_transform": record["layers"], "layers_pattern": pattern}
    return {"target_modules": names, **layers, "fan_in_fan_out": transposed}


def served_modules(kind: Layout) -> list[str]:
    """Return the names of the modules that vLLM has to wrap for an adapter (`--lora-target-modules`)."""
    names = [form.path.removesuffix(".weight").replace(".*", "").split(".") for form in kind.writes if not form.bias]
    return sorted({EXPERTS if EXPERTS in name else name[-1] for name in names})


def configuration(record: dict[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json as a dict, in the form that PEFT reads.

    Every field that changes PEFT's arithmetic is set explicitly, so that no default of PEFT matters. record: the
    provenance, with "padded_rank", "layers", "base" (hub id of the base model, or None), and what `edited_by` reads.
    """
    rank = record["padded_rank"]
    return {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": record["base"]},
        **{"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False},
        **_targets(record),
        **{"inference_mode": True, "init_lora_weights": True, "modules_to_save": None},
    }


def _card(record: dict[str, Any]) -> str:
    """Return the model card, which says what the adapter does."""
    model, layers, kind = record["model_id"], record["layers"], layout_named(record["model_type"])
    base = record["base"] or "BASE"
    base += f" --revision {record['revision']}" if record["base"] and record["revision"] else ""
    lines = [
        *("---", *header_lines(record), "library_name: peft", "tags: [kernel-surgery, lora]", "---", ""),
        *(f"# {Path(model).name}, {title_of(record)}: an adapter", "", *damage_lines(record)),
        f"This adapter edits layers {layers[0]} to {layers[-1]} ({len(layers)} in all) of {model}. There W of",
        f"{_edited_in_words(record)} acts as W - a A_e (B_e^T W),",
        f"with A_e and B_e of rank {record['rank']} and a = {record['strength']:g}{by_layer(record)}.",
        *spans(record, "A_e", "B_e"),
        "",
        "A = a B_e^T W and B = -A_e, with the edit's basis A_e and dual B_e. For an orthogonal edit, A_e = B_e.",
        f"Both are padded with zeros to rank {record['padded_rank']}. alpha = r, so the scaling is 1.",
        "Nothing was trained. The tensors are float32. An engine that rounds them to bfloat16 leaves",
        "about 2^-9 of the part that the edit removes.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        "PEFT loads it with `PeftModel.from_pretrained(model, THIS)`. vLLM serves it beside the original:",
        "",
        f"    vllm serve {base} --enable-lora --max-loras 2 --max-lora-rank "
        f"{record['padded_rank']} --lora-target-modules {' '.join(served_modules(kind))} --lora-modules edited=THIS",
        "",
        "Serve it beside the very weights that it was made of: beside others it is another edit.",
        "",
        *checked_by("--adapter THIS", needed=True),
        f"The original model's card, if it had one, is `{BASE_CARD}`.",
        "`provenance.json` records the SHA-256 of every file and how the subspace was fitted.",
    ]
    return "\n".join(lines) + "\n"


def _edited_in_words(record: dict[str, Any]) -> str:
    """Return the names of what an adapter edits, without their layers."""
    paths = (re.sub(r"^.*?\.\d+\.|\.weight$", "", name) for name in record["edited"])
    names = [f"`{path}`" for path in dict.fromkeys(paths)]
    count = f" ({record['experts']} experts)" if "experts" in record else ""
    return " and ".join(names) + count
