"""The certificate of a model in every mode, together with a baked checkpoint of it if there is one."""

from pathlib import Path
from typing import Any

import torch

from kernel_surgery.certify.files import verify_checkpoint
from kernel_surgery.certify.model import certify_model
from kernel_surgery.checkpoint.record import read_provenance
from kernel_surgery.checkpoint.source import check_source
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.files.tensorfile import EDITABLE
from kernel_surgery.models.load import parse_device, public_name
from kernel_surgery.models.stored import layout_in, layouts, whole_parts
from kernel_surgery.numerics.precision import STORED, name_of
from kernel_surgery.subspace.artifact import Subspace


def stored_dtype(folder: Path, layer: int) -> str:
    """Return the dtype of what writes a layer's MLP output in the files, by its name in torch.

    Of a quantised matrix it is bfloat16, in which engines compute with it.

    Raises CheckpointError if it is missing, and UserError if it has a dtype that cannot be certified.
    """
    part = whole_parts(folder, layouts(folder), [layer])[0]
    dtype = torch.bfloat16 if part.quantised else EDITABLE.get(part.entry.dtype)
    if dtype is None or name_of(dtype) not in DTYPES:
        raise UserError(
            f"{part.name} in {str(folder)!r} is stored as {part.entry.dtype}: only {', '.join(DTYPES)} can be "
            "certified."
        )
    return name_of(dtype)


def _refuse_quantised(source: Path, layer: int) -> None:
    """Raise UserError for a baked checkpoint of a quantised original beside the modes of that original."""
    if whole_parts(source, layouts(source), [layer])[0].quantised:
        raise UserError(
            f"{str(source)!r} is quantised, so its baked checkpoint was rounded in another way than a mode in memory. "
            "Verify the files with --model and --baked alone, and the modes with --model and --subspace alone."
        )


def verify_model(
    source: Path,
    subspace_file: Path,
    *,
    model_id: str,
    baked: Path | None = None,
    strength: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    prompts: int = 8,
    new_tokens: int = 16,
    seed: int = 0,
    whole: bool | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Certify the checkpoint `source` in every mode. Return the certificate as a dict.

    source: folder of the original.
    subspace_file: the subspace.
    model_id: name of the model, for the record.
    baked: a baked checkpoint of `source`. Its files are verified too, and the baked mode uses its weights.
    strength: by default 1, or the strength of `baked`.
    dtype: the name of a dtype, or "auto" for the dtype of the files.
    prompts, new_tokens, seed, whole: as in `certify.model.certify_model`.
    force: accept a subspace of unknown origin, or one fitted on another model.

    Numerics: as in `certify.model.certify_model`.

    Raises what `check_source`, `verify_checkpoint` and `certify_model` raise. Raises UserError for a dtype that cannot
    be certified.
    """
    subspace = Subspace.load(subspace_file, force=force)
    check_source(source, layouts(source), subspace, force=force)
    stored = stored_dtype(source, subspace.layers[0])
    dtype = stored if dtype == "auto" else dtype
    strength = 1.0 if strength is None else strength
    certificate: dict[str, Any] = {"kind": "certificate", "of": {"baked": None, "model": public_name(source)}}
    certificate |= {"tensors": [], "faults": []}
    if baked is not None:
        _refuse_quantised(source, subspace.layers[0])
        strength = float(read_provenance(baked)["strength"])
        if dtype != stored:
            raise UserError(f"a baked checkpoint is certified in its own dtype, {stored}, not {dtype}. Omit --dtype.")
        certificate = verify_checkpoint(baked, source, subspace_file)
    torch_device = parse_device(device)
    model = certify_model(
        source,
        subspace,
        dtype=STORED[dtype].dtype,
        device=torch_device,
        strength=strength,
        made=baked,
        prompts=prompts,
        new_tokens=new_tokens,
        seed=seed,
        whole=whole,
    )
    certificate |= {"model_id": model_id, "strength": strength, "rank": subspace.rank}
    certificate["note"] = subspace.note_on(layout_in(source))
    certificate["faults"] = certificate["faults"] + model.pop("faults")
    return certificate | {"model": model, "environment": environment_record(torch_device)}
