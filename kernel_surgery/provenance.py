"""What every applier that writes a folder shares: all of it or nothing, and a record of what it is.

`provenance.json` holds what was done, to what, with what, and the SHA-256 of every file; the bases lie beside it, so
that the folder can be checked later from itself alone.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_surgery import cli, stream
from kernel_surgery.stream import sha256

if TYPE_CHECKING:
    import torch

PROVENANCE = "provenance.json"
BASES = Path("kernel_surgery") / "subspace.safetensors"


@contextmanager
def opened(file: Path):
    """The safetensors file, open. Raises FileNotFoundError, or ValueError where it is damaged; both name the file."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} cannot be read as safetensors ({error}). Nothing was written.") from error


def check_absent(destination: Path) -> None:
    """Raises FileExistsError if there is something at `destination`."""
    if destination.exists():
        raise FileExistsError(f"{str(destination)!r} exists and was left as it is. Choose another --out.")


@contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `destination`, renamed to it when the block ends; removed again on any exception.

    size: bytes that will be written. Raises FileExistsError if the destination exists, ValueError where there is no
    room, where another process is writing it, and for whatever the file system refuses inside the block.
    """
    from safetensors import SafetensorError

    check_absent(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise ValueError(
            f"{str(destination)!r} needs {size / 1e9:.2f} GB, {str(destination.parent)!r} has {free / 1e9:.2f} GB "
            "left. Nothing was written. Choose another --out."
        )
    temporary = destination.with_name(f".{destination.name}.baking")
    try:
        with stream.locked_folder(temporary):
            yield temporary
            os.rename(temporary, destination)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is writing {str(destination)!r} (it holds {str(temporary)!r}). Nothing was written."
        ) from error
    except SafetensorError as error:
        raise ValueError(f"cannot write {str(destination)!r}: {error}. Nothing was kept.") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(f"cannot write {str(destination)!r}: {error.strerror}{where}. Nothing was kept.") from error


def write_bases(folder: Path, bases: "dict[int, torch.Tensor]") -> None:
    """Keep the bases beside what was made with them, so that it can be checked from the folder alone."""
    from safetensors.torch import save_file

    (folder / BASES).parent.mkdir(exist_ok=True)
    save_file({f"basis.{layer}": basis.contiguous() for layer, basis in bases.items()}, folder / BASES)


def read_bases(folder: Path, record: dict, file: Path = BASES) -> "dict[int, torch.Tensor]":
    """The bases that lie beside what was made with them.

    Raises ValueError where they are not the orthonormal bases of the layers, and of the rank, that the record names.
    """
    from kernel_surgery.subspace import check_bases

    with opened(folder / file) as tensors:
        named = {name: re.fullmatch(r"basis\.(\d+)", name) for name in tensors.keys()}  # noqa: SIM118
        bases = {int(match[1]): tensors.get_tensor(name) for name, match in named.items() if match}
    try:
        bases = check_bases(bases)
    except ValueError as error:
        raise ValueError(f"{str(folder / file)!r}: {error}") from error
    ranks = {basis.shape[1] for basis in bases.values()}
    if sorted(bases) != sorted(record["layers"]) or ranks != {record["rank"]}:
        raise ValueError(
            f"{str(folder / file)!r} holds bases of layers {sorted(bases)}, rank {min(ranks)}; {PROVENANCE} says "
            f"layers {record['layers']}, rank {record['rank']}."
        )
    return bases


def write_provenance(folder: Path, record: dict, hashes: dict[str, str]) -> None:
    """Write the record with the SHA-256 of every file in the folder; `hashes` holds those that are known already."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in hashes:
            hashes[name] = sha256(file)
    record = record | {"sha256": dict(sorted(hashes.items())), "environment": cli.environment()}
    cli.write_atomic(folder / PROVENANCE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def changed_files(folder: Path, hashes: dict[str, str], record: str = PROVENANCE) -> list[str]:
    """Files that are missing or whose SHA-256 is not the recorded one, in sentences."""
    faults = []
    for name, digest in cli.progress(hashes.items(), total=len(hashes), desc="hash"):
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            faults.append(f"{name} is not the file that was written (its SHA-256 differs from {record})")
    return faults


_WRITER = {
    "baked": ("a checkpoint", "kernel_surgery.bake"),
    "restored": ("a checkpoint", "kernel_surgery.bake --undo"),
    "adapter": ("an adapter", "kernel_surgery.lora"),
}


def read_provenance(folder: Path, kind: str = "baked") -> dict:
    """What a "baked" or "restored" checkpoint or an "adapter" says of itself. Raises ValueError for what is none."""
    try:
        record = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        if record["kind"] != kind or not isinstance(record["sha256"], dict):
            raise ValueError(f"it is of a {record['kind']!r} checkpoint")
        if not math.isfinite(float(record["strength"])) or not record["layers"] or int(record["rank"]) < 1:
            raise ValueError("it names no strength, layers or rank")
        if not isinstance(record["model_id"], str) or not all(isinstance(i, int) for i in record["layers"]):
            raise ValueError("it names no model or layers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what, writer = _WRITER[kind]
        raise ValueError(
            f"{str(folder)!r} is not {what} that python -m {writer} has written: its {PROVENANCE} is "
            "missing or says something else. Nothing was written."
        ) from error
    return record
