"""Where a command writes: checks before the work, and files that are written completely or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernel_surgery.common.errors import ExistsError, KernelSurgeryError, UserError
from kernel_surgery.common.names import PROVENANCE

# Errors of a disk that is full or refuses to be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def check_output(path: Path, *, size: int = 0, overwrite: bool | None = None, option: str = "--out") -> None:
    """Check before any work that `path` can be written.

    size: the bytes that will be written. overwrite: whether an existing file may be replaced; None for a new folder.

    Raises ExistsError if there is something at `path` already. Raises UserError if it is a folder where a file is
    written, if a parent cannot hold it, or if the disk has too little space, and for a place inside a written folder:
    only a file at its top may come later, such as a certificate.
    """
    where = f"{option} {str(path)!r}"
    _refuse_inside(path if overwrite is None else path.parent, where)
    there = _there(path, where)
    if there and overwrite is not None and path.is_dir():
        raise UserError(f"{where} is a folder. Name a file in it.")
    if there and not overwrite:
        way_out = "" if overwrite is None else ", or add --overwrite"
        raise ExistsError(f"{str(path)!r} already exists. Choose another {option}{way_out}.")
    _check_room(next(folder for folder in path.absolute().parents if os.path.lexists(folder)), where, size)


def check_folder(path: Path, *, size: int = 0, option: str = "--out") -> None:
    """Check before any work that files can be written to the folder `path`, which may exist.

    Raises UserError as `check_output` does.
    """
    where = f"{option} {str(path)!r}"
    _refuse_inside(path, where)
    if _there(path, where) and not path.is_dir():
        raise UserError(f"{where} is a file. Name a folder.")
    _check_room(next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()), where, size)


def _refuse_inside(path: Path, where: str) -> None:
    """Raise UserError for a path inside a folder whose record names every file in it: `verify` would find faults."""
    for folder in path.absolute().parents:
        if (folder / PROVENANCE).is_file():
            raise UserError(
                f"{where} is inside {str(folder)!r}, and {PROVENANCE} there names every file of that folder: verify "
                "would find what does not belong. Choose a place beside it."
            )


def _there(path: Path, where: str) -> bool:
    """Return whether there is something at `path`. Raises UserError for a name that no file can have."""
    try:
        str(path).encode()
        os.lstat(path)
    except UnicodeEncodeError as error:
        raise UserError(f"{where} cannot be a file's name here: it is not UTF-8. Choose another one.") from error
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, OSError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"{where} cannot be a file's name here ({reason}). Choose another one.") from error
    return True


def in_bytes(size: int) -> str:
    """Return a number of bytes in the unit that people read, such as "1.1 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} bytes"


def _check_room(parent: Path, where: str, size: int) -> None:
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{where} cannot be written: {str(parent)!r} is not a folder that you may write to.")
    if (free := shutil.disk_usage(parent).free) < size:
        raise UserError(f"{where} needs {in_bytes(size)}, but {str(parent)!r} has only {in_bytes(free)} left.")


def mistaken(path: str | os.PathLike) -> str | None:
    """Return what a file is that came in place of a download, as "it is ..."; None if it is nothing of the kind."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if head[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not the file itself: download it again"
    return None


def shareable(path: str | os.PathLike) -> str:
    """Return a path as it may stand in a file that travels: as it is, or only its last name if it is absolute."""
    return Path(path).name if Path(path).is_absolute() else str(path)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file there is renamed to `path` when the block ends.

    Missing parent folders are created. On an exception, the temporary file is removed, and an older file at `path`
    stays unchanged. Raises KernelSurgeryError if the disk is full or refuses the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise KernelSurgeryError(
            f"cannot write {str(path)!r}: {os.strerror(error.errno)}. Make room there, or choose another --out."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically. The text is on the disk when this returns. See `replacing`."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
