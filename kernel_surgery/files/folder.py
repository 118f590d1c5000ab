"""Checkpoint folders: the files that belong to one, and folders that are created completely or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kernel_surgery.common.errors import CheckpointError, ExistsError
from kernel_surgery.common.progress import progress
from kernel_surgery.files.hashing import sha256
from kernel_surgery.files.tensorfile import Entry, read_layout

# Suffixes of weight files. Copies in other formats hold unedited weights, so they do not belong in an edited folder.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: the files that its index names, or model.safetensors.

    They need not exist.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / "model.safetensors"]


def located(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor of a checkpoint: {name: (file, entry)}.

    Raises FileNotFoundError for a missing file, and CheckpointError for a damaged one.
    """
    layouts = [read_layout(file) for file in weight_files(folder)]
    return {name: (layout.path, entry) for layout in layouts for name, entry in layout.entries.items()}


def others(source: Path) -> tuple[list[Path], list[str]]:
    """Sort a checkpoint's other files. Return (files to copy unchanged, names of files to leave out).

    The second list holds weights in other formats, and safetensors files that are not in the index. Subfolders, hidden
    files and the provenance record are in neither list.
    """
    along, left_out = [], []
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == PROVENANCE:
            continue
        if file.suffix in _OTHER_WEIGHTS:
            left_out.append(file.name)
        else:
            along.append(file)
    weights = {file.name for file in weight_files(source)}
    return along, [name for name in left_out if name not in weights]


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Create a folder, empty it, and lock it within the block. On an exception in the block, the folder is removed.

    The lock ends with the process, even a killed one. Raises BlockingIOError if another process holds it.
    """
    import fcntl

    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Remove the leftovers of a killed run.
        for old in path.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            yield
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(handle)


PROVENANCE = "provenance.json"


def check_absent(destination: Path) -> None:
    """Raise ExistsError if `destination` exists."""
    if destination.exists():
        raise ExistsError(f"{str(destination)!r} already exists. Choose another --out.")


@contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
    """Yield a temporary folder beside `destination`. It is renamed to `destination` when the block ends.

    On any exception, the temporary folder is removed. size: the number of bytes that the block will write.

    Raises ExistsError if the destination exists. Raises CheckpointError if the disk has too little space, if another
    process is writing the same folder, and for an error of the file system inside the block.
    """
    check_absent(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise CheckpointError(
            f"{str(destination)!r} needs {size / 1e9:.2f} GB, but {str(destination.parent)!r} has only "
            f"{free / 1e9:.2f} GB left. Choose another --out."
        )
    temporary = destination.with_name(f".{destination.name}.baking")
    try:
        with locked_folder(temporary):
            yield temporary
            os.rename(temporary, destination)
    except BlockingIOError as error:
        raise CheckpointError(
            f"another process is writing {str(destination)!r} (its lock is {str(temporary)!r}). Wait until it is done."
        ) from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {str(destination)!r}: {error}.") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"cannot write {str(destination)!r}: {error.strerror}{where}."
        ) from error


def changed_files(folder: Path, hashes: dict[str, str], record: str = PROVENANCE) -> list[str]:
    """Return one message for each file that is missing or has another SHA-256 than the record.

    hashes: {file name: SHA-256}. record: the name of the record, for the messages.
    """
    faults = []
    for name, digest in progress(hashes.items(), total=len(hashes), desc="hash"):
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            faults.append(f"{name} is not the file that was written (its SHA-256 differs from {record})")
    return faults
