"""The checkpoint before the edit: its editable tensors, and whether a subspace belongs to it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.files.contents import PROVENANCE
from kernel_surgery.files.tensorfile import Entry, Layout, read_tensor
from kernel_surgery.models.architectures import ARCHITECTURES, LLAMA
from kernel_surgery.models.load import read_config
from kernel_surgery.models.stored import layouts as stored_layouts
from kernel_surgery.numerics.precision import STORED
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import sample_weights

EDITABLE_CODES = tuple(STORED[name].code for name in DTYPES)


def check_source(folder: Path, layouts: list[Layout], subspace: Subspace, *, force: bool = False) -> None:
    """Refuse a checkpoint of unknown architecture, and one that the subspace was not fitted on.

    layouts: the headers of its weight files. force: accept a subspace of unknown origin, or one fitted on another
    model. Reads only a few tensors, to compare with the weights that the subspace recorded.

    Raises CheckpointError for an unknown architecture or a missing tensor, and MismatchError if the subspace does not
    belong to the checkpoint.
    """
    config = read_config(folder)
    if config.get("model_type") not in ARCHITECTURES:
        raise CheckpointError(
            f"cannot edit a {config.get('model_type')!r} checkpoint: known architectures are "
            f"{', '.join(ARCHITECTURES)}."
        )
    n_layers = config["num_hidden_layers"]
    places = {name: (layout.path, entry) for layout in layouts for name, entry in layout.entries.items()}
    required = [f"{LLAMA.embedding}.weight", *(f"{LLAMA.site(i)}.weight" for i in range(n_layers))]
    if missing := [name for name in required if name not in places]:
        raise CheckpointError(f"{str(folder)!r} is incomplete: it has no tensor {missing[0]}. Fetch the model again.")

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in required:
            path, entry = places[name]
            with path.open("rb") as file:
                yield name, read_tensor(file.fileno(), entry)

    subspace.check(config["hidden_size"], n_layers, lambda: sample_weights(weights()), str(folder), force=force)


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
