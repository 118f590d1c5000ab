"""The checkpoint before the edit: its editable tensors, and whether a subspace belongs to it."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from kernel_surgery.checkpoint.record import read_provenance
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.edit.baked import refuse_offset_without_bias
from kernel_surgery.edit.lora import refuse_bias, refuse_offset
from kernel_surgery.files.contents import PROVENANCE
from kernel_surgery.files.tensorfile import Entry, Layout, mapped
from kernel_surgery.models.architectures import LLAMA
from kernel_surgery.models.before import check_config, check_stored, fingerprinted
from kernel_surgery.models.stored import layouts as stored_layouts
from kernel_surgery.models.stored import places
from kernel_surgery.numerics.precision import STORED
from kernel_surgery.ops.library import check_rank
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import sample_weights

EDITABLE_CODES = tuple(STORED[name].code for name in DTYPES)


def check_source(folder: Path, layouts: list[Layout], subspace: Subspace, *, force: bool = False) -> None:
    """Refuse a checkpoint of unknown architecture, and one that the subspace was not fitted on.

    layouts: the headers of its weight files. force: accept a subspace of unknown origin, or one fitted on another
    model. Reads only a few tensors, to compare with the weights that the subspace recorded.

    Raises ModelError for an unknown architecture, CheckpointError for a missing tensor, and MismatchError if the
    subspace does not belong to the checkpoint.
    """
    config = check_config(folder)
    found, (d_model, n_layers) = places(layouts), (config["hidden_size"], config["num_hidden_layers"])
    check_stored(folder, config, found)
    weights = ((name, mapped(*found[name])) for name in fingerprinted(config))
    subspace.check(d_model, n_layers, lambda: sample_weights(weights), str(folder), force=force)


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
    edits, stored = subspace.projections, places(found)
    if "fused" in modes:
        check_rank(next(iter(edits.values())).basis)
    for layer, edit in edits.items():
        site = LLAMA.site(layer)
        bias = stored.get(f"{site}.bias")
        if "baked" in modes:
            refuse_offset_without_bias(site, edit, bias is not None)
        if "lora" in modes:
            refuse_offset(edit)
            refuse_bias(site, mapped(*bias) if bias else None)


def original_layouts(source: Path) -> list[Layout]:
    """Return the headers of the weight files of an original checkpoint.

    Raises CheckpointError for a checkpoint that was already baked.
    """
    if (source / PROVENANCE).exists():
        raise CheckpointError(
            f"{str(source)!r} was baked before: it holds {PROVENANCE}. A second edit removes nothing more at strength "
            "1, and adds to the first at any other. Use the original checkpoint."
        )
    return stored_layouts(source)


def editable(layouts: list[Layout], bases: Mapping[int, Tensor]) -> list[Entry]:
    """Return the tensors to edit: the `down_proj` weight of every layer in `bases`, and its bias if there is one.

    Raises CheckpointError for a missing weight, a wrong shape, and a dtype that cannot be edited.
    """
    matches = []
    for layout in layouts:
        for name, entry in layout.entries.items():
            layer = LLAMA.edited_layer(name, bases)
            if layer is None:
                continue
            basis = bases[layer]
            if entry.dtype not in EDITABLE_CODES:
                raise CheckpointError(
                    f"cannot edit {name}: it is stored as {entry.dtype}, not as float32, bfloat16 or float16.\n"
                    "Use the unquantised checkpoint, or eval --mode fused, which does not change the weights."
                )
            if entry.shape[0] != basis.shape[0]:
                raise CheckpointError(
                    f"cannot edit {name}: the basis has d_model={basis.shape[0]}, but the tensor is {entry.shape}.\n"
                    "Fit a subspace on this model."
                )
            matches.append(entry)
    missing = {f"{LLAMA.site(layer)}.weight" for layer in bases} - {entry.name for entry in matches}
    if missing:
        raise CheckpointError(f"{str(layouts[0].path.parent)!r} has no tensor {min(missing)}, which the edit needs.")
    return matches
