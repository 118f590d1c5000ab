"""The edit in a checkpoint's files: safetensors in, safetensors out, nothing else changed; and back again.

One tensor is in memory at a time, the rest is copied by the kernel (`stream.py`). The new folder is built under a
temporary name beside its destination and renamed when it is complete: a destination that exists is whole. In it,
`provenance.json` says what was done, to what, with what; `kernel_surgery/undo.safetensors` holds what was removed,
U^T W of every edited tensor, from which `--undo` restores the weights to within a rounding.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from kernel_surgery.checkpoint.record import edit_record, read_provenance, write_bases, write_provenance
from kernel_surgery.checkpoint.source import (
    check_source,
    editable,
    original_layouts,
)
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.baked import remove
from kernel_surgery.files.folder import PROVENANCE, check_absent, new_folder, others, weight_files
from kernel_surgery.files.hashing import Follower, sha256
from kernel_surgery.files.tensorfile import (
    Entry,
    Layout,
    copy_range,
    opened,
    read_layout,
    read_tensor,
    share_blocks,
    write_tensor,
)
from kernel_surgery.models.architectures import LLAMA
from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.rounding import storage_noise, storage_noise_at_most
from kernel_surgery.subspace.artifact import Subspace

# In a folder of its own: some engines load every *.safetensors that lies beside the weights.
UNDO = Path("kernel_surgery") / "undo.safetensors"
BASE_CARD = "README.base.md"
TensorEdit = Callable[[str, "torch.Tensor"], "torch.Tensor"]


def _write_file(layout: Layout, target: Path, edits: dict[str, TensorEdit], advance) -> Follower:
    """One weight file, front to back: edited tensors computed, everything between them copied. Its hash, under way."""
    edited = sorted((layout.entries[name] for name in edits if name in layout.entries), key=lambda e: e.begin)
    with layout.path.open("rb") as source, target.open("w+b") as out:
        shared = share_blocks(source.fileno(), out.fileno())
        follower = Follower(target, layout.size)
        done = 0

        def reached(upto: int) -> None:
            nonlocal done
            follower.ready(upto)
            advance(upto - done)
            done = upto

        try:
            for entry in [*edited, None]:
                upto = layout.size if entry is None else entry.begin
                if shared:
                    reached(upto)
                else:
                    copy_range(source.fileno(), out.fileno(), done, upto, reached)
                if entry is not None:
                    tensor = edits[entry.name](entry.name, read_tensor(source.fileno(), entry))
                    write_tensor(out.fileno(), entry, tensor)
                    del tensor  # before the next one is read
                    reached(entry.end)
        except BaseException:
            follower.give_up()
            raise
    return follower


def _rewrite(
    source: Path,
    destination: Path,
    layouts: list[Layout],
    edits: dict[str, TensorEdit],
    rename: Callable[[str], str | None],
    finish: Callable[[Path], dict],
) -> None:
    """`source` with some tensors edited as the new folder `destination`; `rename` gives the names under which
    other files go along (None: not at all); `finish(folder)` adds files and returns the record, to which the hash of
    every file is added. All of it or nothing."""
    total = sum(layout.size for layout in layouts)
    with (
        new_folder(destination, total) as temporary,
        progress_bar(total, destination.name, unit="B", unit_scale=True, leave=False) as bar,
    ):
        followers = {}
        for layout in layouts:
            name = layout.path.name
            followers[name] = _write_file(layout, temporary / name, edits, bar.update)
        along, left_out = others(source)
        for file in along:
            if name := rename(file.name):
                shutil.copy(file, temporary / name)
        record = finish(temporary) | {"left_out": left_out}
        write_provenance(temporary, record, {name: follower.hexdigest() for name, follower in followers.items()})


def _card(record: dict) -> str:
    """A model card: what the weights are, and how to take the edit back."""
    model, layers, a = record["model_id"], record["layers"], record["strength"]
    lines = [
        *("---", f"base_model: {json.dumps(model)}", "tags: [kernel-surgery]", "---", ""),
        *(f"# {Path(model).name}, language subspace removed", ""),
        f"These are the weights of {model} with one edit: in layers {layers[0]} to {layers[-1]} ({len(layers)} in all)",
        f"W of `mlp.down_proj` became W - a U (U^T W), with U of rank {record['rank']} and a = {a:g}.",
        "Every other tensor is byte for byte the original's.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        f"`{PROVENANCE}` has the SHA-256 of every file and says how the subspace was found. `{UNDO.as_posix()}`",
        "has what was removed:",
        "",
        "    python -m kernel_surgery.bake --undo --model THIS --out RESTORED",
        "",
        f"takes the edit back to within a rounding. The original's card, where it had one, is `{BASE_CARD}`.",
    ]
    return "\n".join(lines) + "\n"


class _Removal:
    """The edit of a checkpoint's tensors under way: what was removed, U^T W, and the norms before and after."""

    def __init__(self, entries: list[Entry], bases: Mapping[int, torch.Tensor], strength: float):
        self.bases, self.strength = bases, strength
        self.norms: dict[str, tuple[float, float]] = {}
        # Allocated before the first weight is read: small tensors that stay, between large ones that come and go, would
        # keep the heap from shrinking (500 MB after 32 layers of 8 MB).
        self.inside: dict[str, torch.Tensor] = {}
        for entry in entries:
            rank = self.basis(entry.name).shape[1]
            wide = torch.float64 if entry.dtype == "F64" else torch.float32
            self.inside[entry.name] = torch.empty(rank, *(entry.shape[1:] or (1,)), dtype=wide)

    def basis(self, name: str) -> torch.Tensor:
        """The basis of a tensor's layer."""
        layer = LLAMA.edited_layer(name, self.bases)
        assert layer is not None, name
        return self.bases[layer]

    def edit(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """One edited tensor. Raises CheckpointError for one that is not finite, or that was baked before."""
        basis = self.basis(name)
        edited, inside = remove(weight, basis, self.strength)
        # One NaN or Inf in a column makes all of that column's inside NaN or Inf.
        if not torch.isfinite(inside).all():
            raise CheckpointError(f"cannot bake {name}: it holds NaN or Inf. Nothing was written.")
        # Element by element the noise takes as long as the edit: computed only where its bound does not settle it.
        held, matrix = float(inside.norm()), self.strength == 1 and weight.ndim == 2
        if matrix and held < 3 * storage_noise_at_most(weight, basis) and held < 3 * storage_noise(weight, basis):
            raise CheckpointError(
                f"cannot bake {name}: it holds no more of the subspace than rounding leaves (norm(U^T W) = "
                f"{float(inside.norm()):.3g}): it was baked with this subspace before. Nothing was written. "
                "Bake the original checkpoint."
            )
        self.norms[name] = float(weight.norm(dtype=torch.float32)), float(edited.norm(dtype=torch.float32))
        self.inside[name].copy_(inside)
        return edited

    def save(self, path: Path) -> None:
        """What `--undo` needs, as one safetensors file."""
        path.parent.mkdir()
        tensors = {f"basis.{layer}": basis.contiguous() for layer, basis in self.bases.items()}
        tensors |= {f"inside.{name}": inside.contiguous() for name, inside in self.inside.items()}
        save_file(tensors, path, metadata={"strength": repr(self.strength)})


def bake_checkpoint(
    source: Path,
    subspace: Subspace,
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
    command: str | None = None,
) -> dict[str, tuple[float, float]]:
    """Write `source` with the edit in its weights to the new folder `destination`; {tensor: (norm before, after)}.

    Float32 arithmetic, one rounding: `reference.baked_element_bound`. Raises what `check_source` raises,
    FileExistsError if `destination` exists, ValueError for a source that was baked before (by its provenance; at
    strength 1 also by its weights), for a layer whose down_proj is not in the files, and for what cannot be edited,
    read or written; on any exception `destination` does not exist and `source` is as it was.
    """
    source, destination = Path(source), Path(destination)
    check_absent(destination)
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    removal = _Removal(editable(layouts, subspace.bases), subspace.bases, strength)

    def finish(folder: Path) -> dict:
        removal.save(folder / UNDO)
        record = edit_record("baked", source, subspace, strength, model_id, command)
        write_atomic(folder / "README.md", _card(record))
        return record

    edits = dict.fromkeys(removal.inside, removal.edit)
    _rewrite(source, destination, layouts, edits, lambda n: BASE_CARD if n == "README.md" else n, finish)
    return removal.norms


def undo_checkpoint(source: Path, destination: Path, *, command: str | None = None) -> dict[str, tuple[float, float]]:
    """Write a baked checkpoint with its edit taken back to the new folder `destination`; {tensor: (norm before,
    after)}.

    W = W' + a U (U^T W), from what was kept beside the weights; within 1.01 u (|W| + |W'|) and float32's own errors,
    not bit for bit. Raises FileExistsError, or ValueError for a folder that is not a baked checkpoint or whose files
    are not those that were written; on any exception `destination` does not exist and `source` is as it was.
    """
    source, destination = Path(source), Path(destination)
    check_absent(destination)
    record = read_provenance(source)
    for name, digest in record["sha256"].items():
        if not (source / name).is_file() or sha256(source / name) != digest:
            raise CheckpointError(
                f"{str(source / name)!r} is not the file that was written when this checkpoint was baked: undoing the "
                "edit would not give back the original. Nothing was written."
            )
    layouts = [read_layout(file) for file in weight_files(source)]
    with opened(source / UNDO) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = [int(name.removeprefix("basis.")) for name in kept if name.startswith("basis.")]
    norms: dict[str, tuple[float, float]] = {}

    def edit(name: str, weight: torch.Tensor) -> torch.Tensor:
        basis, inside = kept[f"basis.{LLAMA.edited_layer(name, layers)}"], kept[f"inside.{name}"]
        wide = computed_in(weight)
        columns = weight.to(wide).reshape(weight.shape[0], -1)
        with in_full(weight):
            back = torch.addmm(columns, basis.to(wide), inside.to(wide), alpha=record["strength"])
        back = back.reshape(weight.shape).to(weight.dtype)
        norms[name] = float(weight.norm(dtype=torch.float32)), float(back.norm(dtype=torch.float32))
        return back

    def finish(folder: Path) -> dict:
        write_bases(folder, {int(name[6:]): basis for name, basis in kept.items() if name.startswith("basis.")})
        about = {"kind": "restored", "model_id": record["model_id"], "strength": record["strength"]}
        return about | {"rank": record["rank"], "layers": record["layers"], "command": command}

    names = {"README.md": None, BASE_CARD: "README.md"}
    edits = {name.removeprefix("inside."): edit for name in kept if name.startswith("inside.")}
    _rewrite(source, destination, layouts, edits, lambda n: names.get(n, n), finish)
    return norms
