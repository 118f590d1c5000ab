"""The checkpoint before the edit: its editable tensors, and whether a subspace belongs to it."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kernel_surgery.checkpoint.record import is_restored, read_provenance
from kernel_surgery.common.errors import CheckpointError, KernelSurgeryError, MismatchError, ModelError
from kernel_surgery.common.names import DTYPES, PROVENANCE, WRITE
from kernel_surgery.edit.baked import AFTER_A_NORM, refuse_offset_without_bias
from kernel_surgery.edit.lora import refuse_bias, refuse_offset
from kernel_surgery.files.tensorfile import Layout
from kernel_surgery.models.before import check_config
from kernel_surgery.models.stored import StoredPart, layout_in, sampled, whole_parts
from kernel_surgery.models.stored import layouts as stored_layouts
from kernel_surgery.models.table import Layout as Architecture
from kernel_surgery.models.table import holder
from kernel_surgery.numerics.precision import STORED
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.library import check_rank
from kernel_surgery.quantised.formats import unreadable
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import sample_weights

EDITABLE_CODES = tuple(STORED[name].code for name in DTYPES)


def check_source(folder: Path, layouts: list[Layout], subspace: Subspace, *, force: bool = False) -> str | None:
    """Refuse a checkpoint of unknown architecture, and one that the subspace was not fitted on.

    With `force`, return why it would have been refused (`Subspace.doubt`), or None.

    layouts: the headers of its weight files. force: accept a subspace of unknown origin, or one fitted on another
    model. Reads only a few tensors, to compare with the weights that the subspace recorded.

    Raises ModelError for an unknown architecture, CheckpointError for a missing tensor, and MismatchError if the
    subspace does not belong to the checkpoint.
    """
    config = check_config(folder)
    if subspace.site == WRITE and layout_in(folder).after is None:
        raise ModelError(
            f"a {config['model_type']!r} model has no norm after the MLP block: a subspace of site {WRITE} does not "
            "fit it."
        )
    weights = sampled(folder, layouts)
    shape = config["hidden_size"], config["num_hidden_layers"]
    try:
        subspace.check(*shape, lambda: sample_weights(weights.items()), str(folder), force=force)
    except MismatchError as error:
        if is_restored(folder):
            error.add_note(f"{str(folder)!r} was restored, to within a rounding: use the original's own folder.")
        raise
    if not force:
        return None
    try:
        return subspace.doubt(lambda: sample_weights(weights.items()))
    except KernelSurgeryError:  # the edit will say what is wrong with the weights
        return "cannot be compared with them"


def check_edit(folder: Path, subspace: Subspace, modes: Iterable[str], *, force: bool = False) -> None:
    """Refuse an edit that cannot be made on a checkpoint, before the model is loaded. It reads headers and a few pages.

    modes: the ways in which the edit will be made, "original" apart. force: as in `check_source`.

    Raises CheckpointError for a checkpoint that was baked, KernelSurgeryError for a rank that the fused operators do
    not take, for a bias or an offset with mode "lora" and for an offset without a bias with mode "baked", and what
    `check_source` raises.
    """
    record = None
    with suppress(CheckpointError):  # no record of a baked checkpoint, as expected
        record = read_provenance(folder)
    if record:
        raise CheckpointError(
            f"{str(folder)!r} was baked: the edit is in its weights already (rank {record['rank']}, strength "
            f"{record['strength']:g}). Evaluate it with --mode original, or the original model with --mode baked."
        )
    found = stored_layouts(folder)
    check_source(folder, found, subspace, force=force)
    edits, modes = subspace.projections, list(modes)
    refuse_after_norm(subspace, modes)
    if "fused" in modes:
        check_rank(next(iter(edits.values())).basis)
    check_parts(layout_in(folder), whole_parts(folder, found, edits), edits, modes)


def check_parts(
    kind: Architecture, parts: Iterable[StoredPart], edits: Mapping[int, Projection], modes: Iterable[str]
) -> None:
    """Refuse what a mode cannot do. kind: of the architecture. parts: what an edit changes in the files.

    Raises KernelSurgeryError for a bias or an offset with mode "lora", and for an offset without a bias with "baked".
    """
    biases = [part for part in parts if part.form.bias]
    for layer, edit in edits.items():
        site, own = kind.site_name(layer), [part for part in biases if part.layer == layer]
        if "baked" in modes:
            refuse_offset_without_bias(site, edit, any(part.form.role == "dense" for part in own))
        if "lora" in modes:
            refuse_offset(edit)
            for part in own:
                refuse_bias(holder(part.name), part.mapped())


def refuse_after_norm(subspace: Subspace, modes: Iterable[str]) -> None:
    """Raise KernelSurgeryError for a mode that changes weights, if the edit is at the output of a norm."""
    if subspace.site == WRITE and (wrong := [mode for mode in modes if mode in ("baked", "lora")]):
        raise KernelSurgeryError(f"mode {wrong[0]} cannot make this edit: {AFTER_A_NORM}")


def refuse_baked(source: Path, why: str) -> None:
    """Raise CheckpointError for a checkpoint that was baked. why: a sentence. One that was restored has no edit."""
    if (source / PROVENANCE).exists() and not is_restored(source):
        raise CheckpointError(
            f"{str(source)!r} was baked before: it holds {PROVENANCE}. {why} Use the original checkpoint."
        )


def original_layouts(source: Path) -> list[Layout]:
    """Return the headers of the weight files of an original checkpoint. Raises CheckpointError for a baked one."""
    refuse_baked(source, "The same edit again removes nothing more at strength 1, and adds to the first at any other.")
    return stored_layouts(source)


def editable(
    folder: Path, layouts: list[Layout], bases: Mapping[int, Tensor], quantised: str | None = None
) -> list[StoredPart]:
    """Return what to edit: the matrices and biases that write into the MLP block's output of every layer in `bases`.

    layouts: the headers of the weight files. quantised: what is done with quantised matrices: they are refused (None),
    only read ("read"), or written as the options of bake say ("dequantize" or "requantize").

    Raises CheckpointError for a missing matrix, a wrong shape, and a dtype or a format that cannot be edited so.
    """
    if (method := unreadable(folder)) is not None:
        raise CheckpointError(
            f"cannot edit {str(folder)!r}: its weights are quantised by {method}, which is neither read nor written "
            "here.\nUse the unquantised checkpoint: bake it and quantise the result, or write an adapter of it, which "
            "engines add to the quantised weights. Or eval --mode fused or lora, which leave them as they are."
        )
    found = whole_parts(folder, layouts, bases)
    if quantised in ("dequantize", "requantize") and not any(part.quantised for part in found):
        raise CheckpointError(
            f"nothing that the edit changes in {str(folder)!r} is quantised, such as {found[0].name}: omit "
            f"--{quantised}."
        )
    for part in found:
        entry, basis = part.entry, bases[part.layer]
        if part.quantised is not None:
            _check_quantised(part, quantised)
        elif entry.dtype not in EDITABLE_CODES:
            raise CheckpointError(
                f"cannot edit {part.name}: it is stored as {entry.dtype}, not as float32, bfloat16 or float16.\n"
                "Use the unquantised checkpoint, or eval --mode fused, which does not change the weights."
            )
        rows = entry.shape[-1 if part.form.transposed else 0]
        if rows != basis.shape[0]:
            raise CheckpointError(
                f"cannot edit {part.name}: the basis has d_model={basis.shape[0]}, but the tensor is {entry.shape}.\n"
                "Fit a subspace on this model."
            )
    return found


def _check_quantised(part: StoredPart, quantised: str | None) -> None:
    """Refuse a quantised matrix if nothing was said about it, and one that cannot be written as was asked."""
    assert part.quantised is not None  # the caller asked
    how, why = part.quantised.format, part.quantised.refusal
    ways = "--dequantize writes the whole checkpoint as bfloat16"
    leave = "An adapter (kernel_surgery.lora) and eval --mode fused leave the weights as they are."
    if quantised is None:
        ways += "" if why else ", --requantize writes the edited matrices back in their own format"
        raise CheckpointError(f"cannot edit {part.name}: it is quantised ({how}).\n{ways}. {leave}")
    if quantised == "requantize" and why:
        raise CheckpointError(f"cannot write {part.name} in its own format ({how}): {why}.\n{ways}. {leave}")
