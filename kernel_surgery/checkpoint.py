"""The edit in a checkpoint's files: safetensors in, safetensors out, nothing else changed.

One weight file is in memory at a time. The new folder is built under a temporary name beside its destination and
renamed when it is complete: a destination that exists is whole. `provenance.json` in it says what was done, to what,
with what.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli

if TYPE_CHECKING:
    from kernel_surgery.subspace import Subspace

_DOWN_PROJ = re.compile(r"model\.layers\.(\d+)\.mlp\.down_proj\.(weight|bias)")
PROVENANCE = "provenance.json"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


@contextmanager
def opened(file: Path):
    """The safetensors file, open. Raises FileNotFoundError, or ValueError where it is damaged; both name the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read as safetensors ({error}). Nothing was written.") from error


def _names(file: Path) -> list[str]:
    with opened(file) as tensors:
        return list(tensors.keys())


def local_folder(source: str) -> Path:
    """The folder of a resolved model: itself, or the hub's files in the local cache, fetched if need be."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.md", "*.jinja"]))


def check_source(folder: Path, subspace: "Subspace", *, force: bool = False) -> None:
    """Refuse a checkpoint that the subspace was not fitted on, or of unknown architecture; reads a few tensors."""
    from kernel_surgery.sites import ARCHITECTURES
    from kernel_surgery.subspace import EMBEDDING, sample_weights

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(
            f"cannot bake a {config.get('model_type')!r} checkpoint: known architectures are "
            f"{', '.join(ARCHITECTURES)}.\nNothing was written."
        )
    n_layers = config["num_hidden_layers"]
    where = {name: file for file in _weight_files(folder) for name in _names(file)}
    wanted = [EMBEDDING, *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(n_layers))]
    if missing := [name for name in wanted if name not in where]:
        raise ValueError(f"{str(folder)!r} has no tensor {missing[0]}. Nothing was written.")

    def weights():
        for name in wanted:
            with opened(where[name]) as file:
                yield name, file.get_tensor(name)

    subspace.check(config["hidden_size"], n_layers, lambda: sample_weights(weights()), str(folder), force=force)


def _edited(file: Path, subspace: "Subspace", strength: float) -> tuple[dict, dict, dict]:
    """(tensors, metadata, {name: (norm before, norm after)}) of one weight file, edited where asked."""
    import torch

    from kernel_surgery.bake import bake_weight

    with opened(file) as source:
        tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        metadata = source.metadata() or {}
    norms = {}
    for name, tensor in tensors.items():
        match = _DOWN_PROJ.fullmatch(name)
        if not match or int(match[1]) not in subspace.bases:
            continue
        basis = subspace.bases[int(match[1])]
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"cannot bake {name}: it is stored as {tensor.dtype}, not as float32, bfloat16 or float16.\n"
                "Nothing was written. Bake the unquantised checkpoint, or use --mode fused, which leaves weights alone."
            )
        if tensor.shape[0] != basis.shape[0]:
            raise ValueError(
                f"cannot bake {name}: basis has d_model={basis.shape[0]}, the tensor is {tuple(tensor.shape)}.\n"
                "Nothing was written. Fit a subspace on this model."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"cannot bake {name}: it holds NaN or Inf. Nothing was written.")
        tensors[name] = bake_weight(tensor, basis, strength)
        norms[name] = (float(tensor.float().norm()), float(tensors[name].float().norm()))
    return tensors, metadata, norms


def bake_checkpoint(
    source: Path,
    subspace: "Subspace",
    destination: Path,
    *,
    strength: float = 1.0,
    model_id: str | None = None,
    force: bool = False,
) -> dict[str, tuple[float, float]]:
    """Write `source` with the edit in its weights to the new folder `destination`; {tensor: (norm before, after)}.

    Raises what `check_source` raises, FileExistsError if `destination` exists,
    ValueError for a source that was baked before, for a layer whose down_proj is not in the files, and for what
    `bake_weight` cannot edit; on any exception `destination` does not exist and `source` is as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise FileExistsError(f"{str(destination)!r} exists and was left as it is. Choose another --out.")
    if (source / PROVENANCE).exists():
        raise ValueError(
            f"{str(source)!r} was baked before (it holds {PROVENANCE}): baking again would not remove anything more at "
            "strength 1 and would compound at any other. Nothing was written. Bake the original checkpoint."
        )
    check_source(source, subspace, force=force)
    files = _weight_files(source)
    wanted = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in subspace.bases}
    if missing := sorted(wanted - {name for file in files for name in _names(file)}):
        raise ValueError(f"{str(source)!r} has no tensor {missing[0]}. Nothing was written.")
    # A rerun after a kill finds the same name and starts clean: leftovers never pile up.
    temporary = destination.with_name(f".{destination.name}.baking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    norms: dict[str, tuple[float, float]] = {}
    try:
        for file in cli.progress(files, total=len(files), desc="bake"):
            touched = any((m := _DOWN_PROJ.fullmatch(n)) and int(m[1]) in subspace.bases for n in _names(file))
            if touched:
                tensors, metadata, changed = _edited(file, subspace, strength)
                norms |= changed
                try:
                    save_file(tensors, temporary / file.name, metadata=metadata)
                except SafetensorError as error:  # a full disk, most likely
                    raise ValueError(
                        f"cannot write {str(destination / file.name)!r} ({error}). Nothing was kept."
                    ) from error
            else:
                shutil.copy(file, temporary / file.name)
        for other in source.iterdir():
            if other.is_file() and other.suffix != ".safetensors" and not other.name.startswith("."):
                shutil.copy(other, temporary / other.name)
        if untouched := wanted - set(norms):
            raise RuntimeError(f"{sorted(untouched)[0]} was asked for and not edited; nothing was written")
        hashes = {"source": {f.name: sha256(f) for f in files}}
        hashes["baked"] = {f.name: sha256(temporary / f.name) for f in files}
        record = {
            "kind": "baked",
            "model_id": model_id or str(source),
            "strength": strength,
            "layers": list(subspace.layers),
            "rank": subspace.rank,
            "site": subspace.site,
            "note": subspace.note,
            "fit": subspace.fit,
            "sha256": hashes,
            "environment": cli.environment(),
        }
        cli.write_atomic(temporary / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        os.rename(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return norms
