"""The edit as an exact low-rank adapter, for engines that switch adapters by request: W + B A with A = a U^T W, B = -U.

python -m kernel_surgery.lora --model SRC --subspace S --out DIR

What is written is a LoRA adapter in PEFT's format, float32, with alpha = r so that its scaling is 1. Its rank is the
subspace's, filled up with zeros to one that serving engines accept. In exact arithmetic the adapter is the edit; in
floating point it differs from the other forms in one place: it subtracts what W h *would* hold of the subspace, not
what the rounded output of `down_proj` holds (`reference.applied_bound`).
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kernel_surgery.edit import Edit, SubspaceLike
    from kernel_surgery.subspace import Subspace

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank takes these; its default is 16
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before a module's name


def padded_rank(k: int) -> int:
    """The smallest rank in RANKS that holds k. Raises ValueError beyond the largest."""
    for rank in RANKS:
        if k <= rank:
            return rank
    raise ValueError(f"no engine takes an adapter of rank {k}: at most {RANKS[-1]}. Fit with a smaller --rank.")


def adapter(weight: "Tensor", basis: "Tensor", strength: float = 1.0) -> "tuple[Tensor, Tensor]":
    """(A [k, d_ff], B [d_model, k]) in float32, so that (W + B A) h = W h - a U (U^T W h).

    weight [d_model, d_ff] of any floating dtype, basis [d_model, k]. Float32 arithmetic: `reference.adapter_bound`.
    """
    import torch

    from kernel_surgery.reference import computed_in, in_full

    wide = computed_in(weight)
    u = basis.to(weight.device, torch.float32)
    with in_full(weight):
        return (strength * (u.T.to(wide) @ weight.detach().to(wide))).float(), -u


def refuse_bias(name: str, bias: "Tensor | None") -> None:
    """Raises ValueError for a bias that is not zero: an adapter adds B A h, which knows nothing of it."""
    if bias is not None and bool((bias != 0).any()):
        raise ValueError(
            f"{name} has a bias, and an adapter cannot edit a bias: what it adds depends on the input alone. Nothing "
            "was changed. Use bake or --mode fused, which edit biases too."
        )


def _adapted(output: "Tensor", stacked: "Tensor", strength: float, h: "Tensor") -> "Tensor":
    """What PEFT computes with a float32 adapter: output + B (A h), in float32, one rounding."""
    from kernel_surgery.reference import computed_in, in_full

    wide = computed_in(output)
    d = output.shape[-1]
    b, a = stacked[:d].to(wide), stacked[d:].to(wide)
    with in_full(output):
        return (output.to(wide) + (h.to(wide) @ a) @ b.T).to(output.dtype)


@contextmanager
def adapted(
    model: "nn.Module",
    subspace: "SubspaceLike",
    strength: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    force: bool = False,
) -> "Iterator[Edit]":
    """While the block lasts, `down_proj` of every layer of `subspace` gives W h + B (A h), the adapter's arithmetic.

    Weights untouched. layers, force: as in `hook.hooked`. Raises what `edit.plan_edit` raises, and ValueError for a
    bias that is not zero, before anything is changed; the model is as it was when the block ends, by an exception too.
    """
    from dataclasses import replace

    import torch

    from kernel_surgery.edit import made_edit, output_hooks, plan_edit

    plan = plan_edit(model, subspace, strength, layers, force)
    stacked = {}
    for layer, site in plan.sites.items():
        refuse_bias(site.name, site.module.bias)
        a, b = adapter(site.module.weight, plan.bases[layer], plan.strength)
        # One buffer a layer, [d_model + d_ff, k]: B above A^T.
        stacked[layer] = torch.cat([b, a.T])
    plan = replace(plan, bases=stacked)
    edit = made_edit("lora", plan, "torch/eager")
    with output_hooks(plan, edit, _adapted, reads_input=True):
        yield edit


def write_adapter(
    source: Path,
    subspace: "Subspace",
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
    import torch
    from safetensors.torch import save_file

    from kernel_surgery import stream
    from kernel_surgery.checkpoint import check_source, editable, edited_name, original_layouts, revision_of
    from kernel_surgery.provenance import check_absent, new_folder, write_bases, write_provenance

    source, destination = Path(source), Path(destination)
    check_absent(destination)
    rank = padded_rank(subspace.rank)
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    files = {name: layout.path for layout in layouts for name in layout.entries}
    tensors = {}
    found = editable(layouts, subspace.bases)
    for entry in cli.progress(found, total=len(found), desc=destination.name):
        with files[entry.name].open("rb") as file:
            weight = stream.read_tensor(file.fileno(), entry)
        if weight.ndim == 1:
            refuse_bias(entry.name.removesuffix(".bias"), weight)
            continue
        basis = subspace.bases[edited_name(entry.name, subspace.bases)]
        a, b = adapter(weight, basis, strength)
        # One NaN or Inf in a column makes all of that column's A NaN or Inf.
        if not torch.isfinite(a).all():
            raise ValueError(f"{entry.name} holds NaN or Inf. Nothing was written.")
        missing = rank - subspace.rank
        module = PREFIX + entry.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    record = {"kind": "adapter", "model_id": model_id or str(source), "strength": strength}
    record |= {"layers": list(subspace.layers), "rank": subspace.rank, "padded_rank": rank, "site": subspace.site}
    record |= {"revision": revision_of(source, subspace), "note": subspace.note, "fit": subspace.fit}
    record["command"] = command
    # PEFT looks the base model up under this name: a folder by its path, whatever it was called on the command line.
    is_id = model_id is not None and not Path(model_id).exists() and model_id != "polyglot"
    record["base"] = model_id if is_id else str(source.resolve())
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_folder(destination, size) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_bases(folder, dict(subspace.bases))
        cli.write_atomic(folder / CONFIG, json.dumps(configuration(record), indent=2) + "\n")
        cli.write_atomic(folder / "README.md", _card(record))
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description="Write the edit as a LoRA adapter that serving engines can switch by request.")
    p.add_argument("--model", required=True, help='"polyglot", a folder, or a hub id')
    p.add_argument("--subspace", type=Path, required=True, help="subspace file (safetensors)")
    p.add_argument("--out", type=Path, required=True, help="new folder for the adapter")
    p.add_argument("--strength", type=float, default=1.0, help="1 removes the subspace (default), 2 reflects it")
    p.add_argument("--force", action="store_true", help="accept a subspace of unknown or foreign provenance")
    return p


def run(argv: list[str] | None = None) -> int:
    """Check that the subspace belongs to the checkpoint, write the adapter, say its rank."""
    import math

    args = parser().parse_args(argv)
    if not math.isfinite(args.strength):
        raise cli.UserError(f"--strength must be a finite number, got {args.strength}.")
    command = cli.command_line("kernel_surgery.lora", argv)
    source = cli.resolve_model(args.model)

    from kernel_surgery.checkpoint import local_folder
    from kernel_surgery.subspace import Subspace

    subspace = Subspace.load(args.subspace, force=args.force)
    options = {"strength": args.strength, "model_id": args.model, "force": args.force, "command": command}
    rank = write_adapter(local_folder(source), subspace, args.out, **options)
    if subspace.note:
        print(subspace.note)
    print(
        f"{args.out}: {len(subspace.layers)} layers, rank {subspace.rank} filled up to {rank}, strength "
        f"{args.strength:g}"
    )
    return 0


if __name__ == "__main__":
    cli.main(run)
