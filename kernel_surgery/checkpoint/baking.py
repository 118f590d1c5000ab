"""The edit in the files of a checkpoint: bake it into the weights, and undo it.

Only the edited tensors change. One tensor is in memory at a time; the rest is copied by the operating system
(`files.tensorfile`). The new folder is built under a temporary name beside its destination and renamed when it is
complete. So a destination that exists is complete.

The new folder also holds two files of ours. `provenance.json` records what was done, to which checkpoint, and with
which subspace. `kernel_surgery/undo.safetensors` holds what was read to be removed, B^T W of every edited tensor.
`--undo` restores the weights from it to within a rounding.

Of a quantised checkpoint either everything is written as bfloat16 (`checkpoint.dequantising`), or the edited matrices
are written back in their own format. A matrix that was quantised again cannot be restored, so nothing is kept for that.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.checkpoint.card import card_of
from kernel_surgery.checkpoint.dequantising import Dequantised, PartEdit
from kernel_surgery.checkpoint.record import (
    BASE_CARD,
    UNDO,
    check_base,
    edit_record,
    edit_tensors,
    edits_in,
    is_requantised,
    read_provenance,
    strength_at,
    write_edits,
    write_provenance,
)
from kernel_surgery.checkpoint.source import check_parts, check_source, editable, original_layouts, refuse_after_norm
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import check_output, write_atomic
from kernel_surgery.common.progress import progress, progress_bar
from kernel_surgery.edit.baked import remove
from kernel_surgery.files.contents import DOCUMENT, contents
from kernel_surgery.files.folder import changed_files, new_folder
from kernel_surgery.files.hashing import Follower
from kernel_surgery.files.tensorfile import (
    Entry,
    Layout,
    copy_range,
    opened,
    read_layout,
    read_tensor,
    reserve_tensors,
    share_blocks,
    write_tensor,
)
from kernel_surgery.models.stored import StoredPart, counted, layout_in, parts
from kernel_surgery.models.stored import layouts as stored_layouts
from kernel_surgery.numerics.precision import computed_in, in_full
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.numerics.rounding import storage_noise, storage_noise_at_most
from kernel_surgery.quantised.matrix import write
from kernel_surgery.subspace.artifact import Subspace


def _write_file(
    layout: Layout,
    target: Path,
    parts: Iterable[StoredPart],
    edit: PartEdit,
    advance: Callable[[int], object],
    final: bool = True,
) -> Follower | None:
    """Write one weight file from front to back: compute the edited tensors, copy the bytes between them.

    Return a `Follower`, which is still hashing the file, or None if its bytes are not `final`. advance: called with the
    number of bytes that were finished.
    """
    edited = sorted((part for part in parts if part.path == layout.path), key=lambda part: part.entry.begin)
    with layout.path.open("rb") as source, target.open("w+b") as out:
        shared = share_blocks(source.fileno(), out.fileno())
        follower = Follower(target, layout.size) if final else None
        done = 0

        def reached(upto: int) -> None:
            nonlocal done
            if follower is not None:
                follower.ready(upto)
            advance(upto - done)
            done = upto

        try:
            for part in [*edited, None]:
                upto = layout.size if part is None else part.entry.begin
                if shared:
                    reached(upto)
                else:
                    copy_range(source.fileno(), out.fileno(), done, upto, reached)
                if part is not None:
                    tensor = edit(part, part.oriented(read_tensor(source.fileno(), part.entry)))
                    write_tensor(out.fileno(), part.entry, part.oriented(tensor))
                    del tensor  # before the next one is read
                    reached(part.entry.end)
        except BaseException:
            if follower is not None:
                follower.give_up()
            raise
    return follower


def _rewrite(
    source: Path,
    destination: Path,
    layouts: list[Layout],
    edits: tuple[list[StoredPart], PartEdit],
    rename: Callable[[str], str | None],
    begin: Callable[[Path], object],
    finish: Callable[[Path], dict[str, Any]],
    dequantised: Dequantised | None = None,
) -> None:
    """Write `source` with some tensors edited to the new folder `destination`, completely or not at all.

    edits: what is edited, and the function that edits it. begin: called with the folder before anything is edited.
    rename: maps the name of a file that is not a weight file to its name in the new folder; None leaves the file out.
    finish: adds files to the folder and returns the record. The hash of every file is added to that record.
    dequantised: writes the weight files, if they are quantised now and plain afterwards.
    """
    in_place, again = [part for part in edits[0] if not part.quantised], [part for part in edits[0] if part.quantised]
    total = sum(layout.size for layout in layouts)
    with (
        new_folder(destination, total) as temporary,
        progress_bar(total, destination.name, unit="B", unit_scale=True, leave=False) as bar,
    ):
        begin(temporary)
        followers = {}
        late = {path.name for part in again if part.quantised for path, _ in part.quantised.pieces.values()}
        for layout in layouts:
            name = layout.path.name
            if dequantised is not None:
                dequantised.write_file(layout, temporary, *edits, bar.update)
            elif follower := _write_file(
                layout, temporary / name, in_place, edits[1], bar.update, final=name not in late
            ):
                followers[name] = follower
        if dequantised is None:
            _requantise(again, edits[1], temporary)
        found, replaced = contents(source), {} if dequantised is None else dequantised.replaced()
        for name in found.along:
            if new_name := rename(name):
                (temporary / new_name).parent.mkdir(exist_ok=True)
                if name in replaced:
                    write_atomic(temporary / new_name, replaced[name])
                else:
                    shutil.copy(source / name, temporary / new_name)
        record = finish(temporary) | {"left_out": list(found.left_out)}
        write_provenance(temporary, record, {name: follower.hexdigest() for name, follower in followers.items()})


def _requantise(parts: list[StoredPart], edit: PartEdit, folder: Path) -> None:
    """Edit quantised matrices of files that were copied to a folder."""
    for part in progress(parts, total=len(parts), desc="requantise") if parts else ():
        assert part.quantised is not None  # the caller chose them
        edited = part.oriented(edit(part, part.read()))
        write(part.quantised, part.quantised.requantised(edited), folder)


class _Removal:
    """Edit the tensors of a checkpoint one by one, and write B^T W of each to the file that undoing needs.

    Collects the norms of every tensor before and after. Nothing that was removed stays in memory, so what is needed
    does not grow with layers or experts.
    """

    def __init__(self, parts: list[StoredPart], subspace: Subspace, strength: float, keep: bool = True):
        self.parts, self.subspace, self.edits, self.strength = parts, subspace, subspace.projections, strength
        self.norms: dict[str, tuple[float, float]] = {}
        self.entries: dict[str, Entry] = {}
        self.path: Path | None = None
        self.keep = keep

    def begin(self, folder: Path) -> None:
        """Make the file for what is removed, with the edit's own tensors. If it is not kept, store those alone."""
        if not self.keep:
            write_edits(folder, self.edits)
            return
        self.path = folder / UNDO
        self.path.parent.mkdir()
        own, shapes = edit_tensors(self.edits), dict[str, tuple[torch.dtype, tuple[int, ...]]]()
        for name, tensor in own.items():
            shapes[name] = tensor.dtype, tuple(tensor.shape)
        for part in self.parts:
            columns = 1 if part.form.bias else part.entry.shape[0 if part.form.transposed else 1]
            wide = torch.float64 if part.entry.dtype == "F64" else torch.float32
            shapes[f"inside.{part.name}"] = wide, (self.subspace.rank, columns)
        self.entries = reserve_tensors(self.path, shapes, {"strength": repr(self.strength)})
        for name, tensor in own.items():
            self._keep(name, tensor)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        if not self.keep:
            return
        assert self.path is not None  # `begin` was called
        with self.path.open("r+b") as file:
            write_tensor(file.fileno(), self.entries[name], tensor)

    def edit(self, part: StoredPart, weight: torch.Tensor) -> torch.Tensor:
        """Return one edited tensor.

        Raises CheckpointError if the tensor is not finite, or if it was baked with this subspace before.
        """
        name, projection = part.name, self.edits[part.layer]
        strength = self.subspace.strength_at(part.layer, self.strength)
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
        self._keep(f"inside.{name}", inside)
        return edited


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
    base: str | None = None,
    force: bool = False,
    command: str | None = None,
    measure: Callable[[], dict[str, Any]] | None = None,
    quantised: str | None = None,
) -> dict[str, tuple[float, float]]:
    """Write `source` with the edit in its weights to the new folder `destination`.

    source: folder of a checkpoint that was not baked.
    subspace: its edits; the edited layers are its layers.
    strength: a in W <- W - a A (B^T W), b <- b - a A (B^T b - c). The subspace's schedule multiplies it.
    model_id: name of the model for the records, by default the folder. base: its hub id, if that is another name.
    force: accept a subspace of unknown origin, or one fitted on another model.
    command: the command line, for the record.
    measure: called after all checks, before anything is written. It returns the damage for the record and the card
    (`damage.before`); what it raises leaves nothing behind.
    quantised: of a quantised checkpoint, "dequantize" (write it as bfloat16) or "requantize" (write the edited matrices
    back in their own format). None refuses one.

    Returns {tensor name: (Frobenius norm before, after)}.

    Numerics: float32 arithmetic with one rounding at the end (`edit.baked.remove`). The error bound is
    `numerics.bounds.baked_element_bound`.

    Raises what `checkpoint.source.check_source` raises, and FileExistsError if `destination` exists. Raises
    KernelSurgeryError for a source that was baked before, a layer without its matrices in the files, an offset without
    a bias, and tensors or files that cannot be edited, read or written. An earlier bake is recognised by its provenance
    file; at strength 1 also by the weights. After any exception `destination` does not exist and `source` is unchanged.
    """
    source, destination = Path(source), Path(destination)
    check_base(base)
    check_output(destination)
    layouts = original_layouts(source)
    doubt = check_source(source, layouts, subspace, force=force)
    refuse_after_norm(subspace, ["baked"])
    edited = editable(source, layouts, subspace.bases, quantised)
    check_parts(layout_in(source), edited, subspace.projections, ["baked"])
    plain = Dequantised(source, layouts) if quantised == "dequantize" else None
    check_output(destination, size=plain.size if plain else sum(layout.size for layout in layouts))
    damage = measure() if measure else None
    removal = _Removal(edited, subspace, strength, keep=quantised != "requantize")

    def finish(folder: Path) -> dict[str, Any]:
        given = ("baked", source, subspace, strength, model_id, command)
        record = edit_record(*given, base=base, doubt=doubt, damage=damage)
        if quantised is not None:
            again = [part.quantised.format for part in edited if part.quantised]
            own = {"how": "requantised", "format": sorted(set(again)), "matrices": len(again)}
            record["quantisation"] = own if plain is None else plain.record()
        write_atomic(folder / "README.md", card_of(record, layout_in(source).site, counted(edited)))
        return record

    edits = edited, removal.edit
    rename = {"README.md": BASE_CARD}
    _rewrite(source, destination, layouts, edits, lambda n: rename.get(n, n), removal.begin, finish, plain)
    return removal.norms


def _read_undo(source: Path, layouts: list[Layout]) -> tuple[dict[int, Projection], list[StoredPart], dict[str, Entry]]:
    """Return what a baked checkpoint keeps for its undoing: {layer: edit}, what was edited, and the entries of B^T W.

    The names of those begin with "inside.".

    Raises CheckpointError for a file that does not fit the checkpoint.
    """
    path = source / UNDO
    with opened(path) as file:
        names = list(file.keys())
        edits = edits_in({name: file.get_tensor(name) for name in names if not name.startswith("inside.")})
    entries = {name: entry for name, entry in read_layout(path).entries.items() if name.startswith("inside.")}
    found = {f"inside.{part.name}": part for part in parts(layout_in(source), layouts, edits)}
    for name, entry in entries.items():
        part = found.get(name)
        shape = () if part is None else tuple(part.oriented(torch.empty(part.entry.shape, device="meta")).shape)
        rows, columns = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
        basis = torch.empty(0, 0) if part is None else edits[part.layer].basis
        if basis.shape[0] != rows or entry.shape != (basis.shape[1], columns):
            raise CheckpointError(
                f"{str(path)!r} does not fit its checkpoint: it holds {entry.shape} numbers for "
                f"{name.removeprefix('inside.')}, whose shape is {shape or 'missing'}. The edit cannot be undone."
            )
    return edits, [found[name] for name in entries], entries


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
    if is_requantised(record):
        raise CheckpointError(
            f"the edit of {str(source)!r} cannot be undone: its matrices were quantised again, and the numbers before "
            f"that are not known to within a rounding. Use the original, {record['model_id']}, or bake it with "
            "--dequantize, which can be undone."
        )
    # A card that was rewritten since changes nothing of the model; it is copied as it is now.
    read_by_engines = {name: digest for name, digest in record["sha256"].items() if not DOCUMENT.fullmatch(name)}
    if changed := changed_files(source, read_by_engines):
        raise CheckpointError(
            f"{str(source)!r} is not as it was baked: {changed[0]}. Undoing the edit would not restore the original."
        )
    layouts = stored_layouts(source)
    edits, edited, insides = _read_undo(source, layouts)
    norms: dict[str, tuple[float, float]] = {}

    def edit(part: StoredPart, weight: torch.Tensor) -> torch.Tensor:
        with (source / UNDO).open("rb") as file:
            inside = read_tensor(file.fileno(), insides[f"inside.{part.name}"])
        basis, strength = edits[part.layer].basis, strength_at(record, part.layer)
        wide = computed_in(weight)
        columns = weight.to(wide).reshape(weight.shape[0], -1)
        with in_full(weight):
            restored = torch.addmm(columns, basis.to(wide), inside.to(wide), alpha=strength)
        restored = restored.reshape(weight.shape).to(weight.dtype)
        _check_fits(part.name, restored, strength)
        norms[part.name] = float(weight.norm(dtype=torch.float32)), float(restored.norm(dtype=torch.float32))
        return restored

    def finish(folder: Path) -> dict[str, Any]:
        write_edits(folder, edits)
        header = {"kind": "restored", "model_id": record["model_id"], "strength": record["strength"]}
        header |= {key: record[key] for key in ("schedule", "quantisation") if key in record}
        return header | {"rank": record["rank"], "layers": record["layers"], "command": command}

    # What was added later, such as a certificate, is about the edited weights.
    added = contents(source).along
    names: dict[str, str | None] = {name: None for name in added if name not in record["sha256"]}
    names |= {"README.md": None, BASE_CARD: "README.md"}
    _rewrite(source, destination, layouts, (edited, edit), lambda n: names.get(n, n), lambda folder: None, finish)
    return norms
