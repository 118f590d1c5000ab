"""Folders that are created completely or not at all, and what has changed in one."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import check_output
from kernel_surgery.common.names import PROVENANCE
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.files.hashing import sha256


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


@contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
    """Yield a temporary folder beside `destination`. It is renamed to `destination` when the block ends.

    On any exception, the temporary folder is removed. size: the number of bytes that the block will write.

    Raises what `common.files.check_output` raises: the destination exists, or the disk has too little space. Raises
    CheckpointError if another process is writing the same folder, and for an error of the file system inside the block.
    """
    check_output(destination, size=size)
    destination.parent.mkdir(parents=True, exist_ok=True)
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
    there = [name for name in hashes if (folder / name).is_file()]
    total = sum((folder / name).stat().st_size for name in there)
    with progress_bar(total, "hash", unit="B", unit_scale=True, leave=False) as bar:
        for name, digest in hashes.items():
            if name not in there:
                faults.append(f"{name} is missing")
            elif sha256(folder / name, bar.update) != digest:
                faults.append(f"{name} is not the file that was written (its SHA-256 differs from {record})")
    return faults
