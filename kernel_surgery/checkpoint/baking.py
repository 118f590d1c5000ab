"""The edit in the files of a checkpoint: bake it into the weights, and undo it.

Only the edited tensors change. One tensor is in memory at a time; the rest is copied by the operating system
(`files.tensorfile`). The new folder is built under a temporary name beside its destination and renamed when it is
complete. So a destination that exists is complete.

The new folder also holds two files of ours. `provenance.json` records what was done, to which checkpoint, and with
which subspace. `kernel_surgery/undo.safetensors` holds what was read to be removed, B^T W of every edited tensor.
`--undo` restores the weights from it to within a rounding.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.checkpoint.record import (
    base_model_line,
    damage_lines,
    edit_record,
    edit_tensors,
    edits_in,
    read_provenance,
    strength_at,
    write_edits,
    write_provenance,
)
from kernel_surgery.checkpoint.source import (
    check_source,
    editable,
    original_layouts,
)
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import check_output, write_atomic
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.baked import refuse_offset_without_bias, remove
from kernel_surgery.files.contents import OURS, PROVENANCE, contents
from kernel_surgery.files.folder import new_folder
from kernel_surgery.files.hashing import Follower, sha256
from kernel_surgery.files.tensorfile import (
    Entry,
    Layout,
    copy_range,
    opened,
    read_tensor,
    save_tensors,
    share_blocks,
    write_tensor,
)
from kernel_surgery.models.architectures import LLAMA
from kernel_surgery.models.stored import layouts as stored_layouts
from kernel_surgery.models.stored import places
from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.numerics.rounding import storage_noise, storage_noise_at_most
from kernel_surgery.subspace.artifact import Subspace

# In a subfolder, because some engines load every *.safetensors beside the weights.
UNDO = Path(OURS) / "undo.safetensors"
BASE_CARD = "README.base.md"
TensorEdit = Callable[[str, "torch.Tensor"], "torch.Tensor"]


def _write_file(
    layout: Layout, target: Path, edits: Mapping[str, TensorEdit], advance: Callable[[int], object]
) -> Follower:
    """Write one weight file from front to back: compute the edited tensors, copy the bytes between them.

    Return a `Follower`, which is still hashing the file. advance: called with the number of bytes that were finished.
    """
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
    edits: Mapping[str, TensorEdit],
    rename: Callable[[str], str | None],
    finish: Callable[[Path], dict[str, Any]],
) -> None:
    """Write `source` with some tensors edited to the new folder `destination`, completely or not at all.

    edits: {tensor name: function that returns the edited tensor}.
    rename: maps the name of a file that is not a weight file to its name in the new folder; None leaves the file out.
    finish: adds files to the folder and returns the record. The hash of every file is added to that record.
    """
    total = sum(layout.size for layout in layouts)
    with (
        new_folder(destination, total) as temporary,
        progress_bar(total, destination.name, unit="B", unit_scale=True, leave=False) as bar,
    ):
        followers = {}
        for layout in layouts:
            name = layout.path.name
            followers[name] = _write_file(layout, temporary / name, edits, bar.update)
        found = contents(source)
        for name in found.along:
            if new_name := rename(name):
                (temporary / new_name).parent.mkdir(exist_ok=True)
                shutil.copy(source / name, temporary / new_name)
        record = finish(temporary) | {"left_out": list(found.left_out)}
        write_provenance(temporary, record, {name: follower.hexdigest() for name, follower in followers.items()})


def _card(record: dict[str, Any]) -> str:
    """Return the model card, which says what the weights are and how to undo the edit."""
    model, layers, a = record["model_id"], record["layers"], record["strength"]
    lines = [
        *("---", *base_model_line(record), "tags: [kernel-surgery]", "---", ""),
        *(f"# {Path(model).name}, language subspace removed", "", *damage_lines(record)),
        f"These are the weights of {model} with one edit. In layers {layers[0]} to {layers[-1]} ({len(layers)} in all)",
        f"the weight W of `mlp.down_proj` became W - a U (U^T W), with U of rank {record['rank']} and a = {a:g}.",
        "U spans the language subspace: the directions in which activations of one problem differ between languages.",
        "Every other tensor is byte-identical to the original.",
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        f"`{PROVENANCE}` records the SHA-256 of every file and how the subspace was fitted.",
        f"`{UNDO.as_posix()}` holds the part that was removed. This command undoes the edit, to within rounding:",
        "",
        "    python -m kernel_surgery.bake --undo --model THIS --out RESTORED",
        "",
        f"The original model's card, if it had one, is `{BASE_CARD}`.",
    ]
    return "\n".join(lines) + "\n"


class _Removal:
    """Edit the tensors of a checkpoint one by one.

    Collects B^T W of every tensor (`inside`), and its norm before and after (`norms`).
    """

    def __init__(self, entries: list[Entry], subspace: Subspace, strength: float):
        self.subspace, self.edits, self.strength = subspace, subspace.projections, strength
        self.norms: dict[str, tuple[float, float]] = {}
        # Allocate these before the first weight is read. Small long-lived tensors between large short-lived ones would
        # keep the heap from shrinking (500 MB after 32 layers of 8 MB).
        self.inside: dict[str, torch.Tensor] = {}
        for entry in entries:
            rank = subspace.rank
            wide = torch.float64 if entry.dtype == "F64" else torch.float32
            self.inside[entry.name] = torch.empty(rank, *(entry.shape[1:] or (1,)), dtype=wide)

    def edit_of(self, name: str) -> tuple[Projection, float]:
        """Return the edit and the strength of the layer that a tensor belongs to."""
        layer = LLAMA.edited_layer(name, self.edits)
        assert layer is not None, name
        return self.edits[layer], self.subspace.strength_at(layer, self.strength)

    def edit(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return one edited tensor.

        Raises CheckpointError if the tensor is not finite, or if it was baked with this subspace before.
        """
        projection, strength = self.edit_of(name)
        edited, inside = remove(weight, projection, strength)
        # A NaN or Inf in a column makes the whole column of B^T W NaN or Inf, so checking B^T W is enough.
        if not torch.isfinite(inside).all():
            raise CheckpointError(f"cannot bake {name}: it holds NaN or Inf.")
        _check_fits(name, edited, strength)
        # The exact noise takes as long as the edit. Compute it only if its cheap upper bound leaves the case open.
        inside_norm, checkable = float(inside.norm()), strength == 1 and weight.ndim == 2
        if (
            checkable
            and inside_norm < 3 * storage_noise_at_most(weight, projection)
            and inside_norm < 3 * storage_noise(weight, projection)
        ):
            raise CheckpointError(
                f"cannot bake {name}: it holds no more of the subspace than rounding leaves (norm(B^T W) = "
                f"{float(inside.norm()):.3g}). It was baked with this subspace before. "
                "Bake the original checkpoint."
            )
        self.norms[name] = float(weight.norm(dtype=torch.float32)), float(edited.norm(dtype=torch.float32))
        self.inside[name].copy_(inside)
        return edited

    def save(self, path: Path) -> None:
        """Write the data that `--undo` needs to one safetensors file."""
        path.parent.mkdir()
        tensors = edit_tensors(self.edits)
        tensors |= {f"inside.{name}": inside.contiguous() for name, inside in self.inside.items()}
        save_tensors(tensors, path, metadata={"strength": repr(self.strength)})


def _check_fits(name: str, edited: torch.Tensor, strength: float) -> None:
    if not torch.isfinite(edited).all():
        kind, most = str(edited.dtype).removeprefix("torch."), torch.finfo(edited.dtype).max
        raise CheckpointError(
            f"cannot write {name}: at strength {strength:g}, some of its elements are beyond the largest {kind} number "
            f"({most:.3g}). Choose a strength nearer to 1."
        )


def bake_checkpoint(
    source: Path,
    subspace: Subspace,
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
    command: str | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, tuple[float, float]]:
    """Write `source` with the edit in its weights to the new folder `destination`.

    source: folder of a checkpoint that was not baked.
    subspace: its edits; the edited layers are its layers.
    strength: a in W <- W - a A (B^T W), b <- b - a A (B^T b - c). The subspace's schedule multiplies it.
    model_id: name of the model for the records, by default the folder.
    force: accept a subspace of unknown origin, or one fitted on another model.
    command: the command line, for the record.
    measure: called after all checks, before anything is written. It returns the damage for the record and the card
    (`damage.before`); what it raises leaves nothing behind.

    Returns {tensor name: (Frobenius norm before, after)}.

    Numerics: float32 arithmetic with one rounding at the end (`edit.baked.remove`). The error bound is
    `numerics.bounds.baked_element_bound`.

    Raises what `checkpoint.source.check_source` raises, and FileExistsError if `destination` exists. Raises
    KernelSurgeryError for a source that was baked before, a layer without a `down_proj` in the files, an offset without
    a bias, and tensors or files that cannot be edited, read or written. An earlier bake is recognised by its provenance
    file; at strength 1 also by the weights. After any exception `destination` does not exist and `source` is unchanged.
    """
    source, destination = Path(source), Path(destination)
    check_output(destination)
    layouts = original_layouts(source)
    check_source(source, layouts, subspace, force=force)
    entries, stored = editable(layouts, subspace.bases), places(layouts)
    for layer, projection in subspace.projections.items():
        site = LLAMA.site(layer)
        refuse_offset_without_bias(site, projection, f"{site}.bias" in stored)
    check_output(destination, size=sum(layout.size for layout in layouts))
    damage = measure() if measure else None
    removal = _Removal(entries, subspace, strength)

    def finish(folder: Path) -> dict[str, Any]:
        removal.save(folder / UNDO)
        record = edit_record("baked", source, subspace, strength, model_id, command, damage=damage)
        write_atomic(folder / "README.md", _card(record))
        return record

    edits = dict.fromkeys(removal.inside, removal.edit)
    _rewrite(source, destination, layouts, edits, lambda n: BASE_CARD if n == "README.md" else n, finish)
    return removal.norms


def _read_undo(path: Path, layouts: list[Layout]) -> tuple[dict[int, Projection], dict[str, torch.Tensor]]:
    """Return what a baked checkpoint keeps for its undoing: ({layer: edit}, {tensor name: B^T W}).

    Raises CheckpointError for a file that does not fit the checkpoint.
    """
    with opened(path) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = places(layouts)
    edits = edits_in(found)
    insides = {name.removeprefix("inside."): t for name, t in found.items() if name.startswith("inside.")}
    for name, inside in insides.items():
        layer = LLAMA.edited_layer(name, edits)
        shape = stored[name][1].shape if name in stored else ()
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        basis = torch.empty(0, 0) if layer is None else edits[layer].basis
        if basis.shape[0] != rows or inside.shape != (basis.shape[1], columns):
            raise CheckpointError(
                f"{str(path)!r} does not fit its checkpoint: it holds {tuple(inside.shape)} numbers for {name}, whose "
                f"shape is {shape or 'missing'}. The edit cannot be undone."
            )
    return edits, insides


def undo_checkpoint(source: Path, destination: Path, *, command: str | None = None) -> dict[str, tuple[float, float]]:
    """Write the baked checkpoint `source` with its edit undone to the new folder `destination`.

    Computes W = W' + a A (B^T W) from the B^T W that was saved when W' was baked. Returns {tensor name: (norm before,
    after)}. command: the command line, for the record.

    Numerics: float32 arithmetic. The result is not bit-identical to the original. It is within 1.01 u (|W| + |W'|) plus
    float32's own error, where u is the unit roundoff of the stored dtype (`numerics.bounds.undo_bound`).

    Raises FileExistsError if `destination` exists. Raises CheckpointError if `source` is not a baked checkpoint, or if
    its files have changed since. After any exception `destination` does not exist and `source` is unchanged.
    """
    source, destination = Path(source), Path(destination)
    check_output(destination)
    record = read_provenance(source)
    for name, digest in record["sha256"].items():
        if not (source / name).is_file() or sha256(source / name) != digest:
            raise CheckpointError(
                f"{str(source / name)!r} is not the file that was written when this checkpoint was baked. Undoing the "
                "edit would not restore the original."
            )
    layouts = stored_layouts(source)
    edits, insides = _read_undo(source / UNDO, layouts)
    norms: dict[str, tuple[float, float]] = {}

    def edit(name: str, weight: torch.Tensor) -> torch.Tensor:
        layer = LLAMA.edited_layer(name, edits)
        assert layer is not None  # `_read_undo`
        basis, inside, strength = edits[layer].basis, insides[name], strength_at(record, layer)
        wide = computed_in(weight)
        columns = weight.to(wide).reshape(weight.shape[0], -1)
        with in_full(weight):
            restored = torch.addmm(columns, basis.to(wide), inside.to(wide), alpha=strength)
        restored = restored.reshape(weight.shape).to(weight.dtype)
        _check_fits(name, restored, strength)
        norms[name] = float(weight.norm(dtype=torch.float32)), float(restored.norm(dtype=torch.float32))
        return restored

    def finish(folder: Path) -> dict[str, Any]:
        write_edits(folder, edits)
        header = {"kind": "restored", "model_id": record["model_id"], "strength": record["strength"]}
        header |= {"schedule": record["schedule"]} if "schedule" in record else {}
        return header | {"rank": record["rank"], "layers": record["layers"], "command": command}

    names: dict[str, str | None] = {"README.md": None, BASE_CARD: "README.md"}
    _rewrite(source, destination, layouts, dict.fromkeys(insides, edit), lambda n: names.get(n, n), finish)
    return norms
