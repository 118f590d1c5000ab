"""A safetensors file as bytes: where each tensor lies, read one, write one, copy the rest without looking at it.

A baked file has the layout of its source to the byte, for an edit changes neither shapes nor dtypes. So the file is
copied by the cheapest means the filesystem offers and the edited tensors are written over their old bytes: never more
than one tensor is in memory, and nothing else is even decoded.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20
_LARGEST_HEADER = 100 << 20  # the format's own limit
_FICLONE = 0x40049409  # Linux: share the blocks of a whole file (btrfs, xfs)
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
EDITABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Entry:
    """One tensor: its dtype as the file names it, its shape, and where its bytes begin and end in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """What the header of a file says, checked against the file's size."""

    path: Path
    entries: dict[str, Entry]
    size: int


def read_layout(path: Path) -> Layout:
    """Read and check a header. Raises FileNotFoundError, or ValueError for a file that is damaged or cut off."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"{str(path)!r} cannot be read as safetensors ({why}). Nothing was written.")

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if len(head) < 8:
            raise damaged("it is shorter than a header")
        (length,) = struct.unpack("<Q", head)
        if length > min(_LARGEST_HEADER, size - 8):
            raise damaged(f"its header should be {length} bytes long, the file is {size}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            entries = {
                name: Entry(name, e["dtype"], tuple(e["shape"]), *(start + at for at in e["data_offsets"]))
                for name, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(f"its header makes no sense: {error}") from error
    for entry in entries.values():
        count = 1
        for n in entry.shape:
            count *= n
        width = _BYTES.get(entry.dtype)
        if not start <= entry.begin <= entry.end or (width and entry.end - entry.begin != count * width):
            raise damaged(f"{entry.name} lies outside its bytes")
    end = max((entry.end for entry in entries.values()), default=start)
    if end != size:
        raise damaged(f"its tensors end at byte {end}, the file at {size}")
    return Layout(path, entries, size)


def rows_of(entry: Entry, start: int, stop: int) -> Entry:
    """The entry of rows start .. stop of a tensor."""
    width = (entry.end - entry.begin) // entry.shape[0]
    return Entry(
        f"{entry.name}[{start}:{stop}]",
        entry.dtype,
        (stop - start, *entry.shape[1:]),
        entry.begin + start * width,
        entry.begin + stop * width,
    )


def read_tensor(file: int, entry: Entry) -> "torch.Tensor":
    """One tensor of an open file, in memory of its own. Raises ValueError for a dtype that is no float."""
    import torch

    if entry.dtype not in EDITABLE:
        raise ValueError(f"{entry.name} is stored as {entry.dtype}, not as a float")
    buffer = bytearray(entry.end - entry.begin)
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        got = os.preadv(file, [view[done:]], entry.begin + done)
        if got == 0:
            raise OSError(errno.EIO, f"{entry.name} ends early")
        done += got
    flat = torch.frombuffer(buffer, dtype=getattr(torch, EDITABLE[entry.dtype])) if buffer else torch.empty(0)
    return flat.reshape(entry.shape)


def write_tensor(file: int, entry: Entry, tensor: "torch.Tensor") -> None:
    """Write a contiguous tensor over the bytes of an entry of the same dtype and shape."""
    import torch

    if tuple(tensor.shape) != entry.shape or tensor.dtype != getattr(torch, EDITABLE[entry.dtype]):
        raise ValueError(f"{entry.name} is {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    view, done = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], entry.begin + done)


def share_blocks(source: int, target: int) -> bool:
    """Let an empty open file share the blocks of another, where the filesystem can: nothing is copied until written."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False


def copy_range(source: int, target: int, begin: int, end: int, advance: Callable[[int], object]) -> None:
    """Copy bytes begin .. end of an open file to the same place, in the kernel where it can. Raises OSError.

    advance: told where the copy has come to, every few dozen megabytes.
    """
    done, in_kernel = begin, hasattr(os, "copy_file_range")
    while done < end:
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, min(end - done, 4 * CHUNK), done, done)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                copied = 0
            in_kernel = copied > 0
            done += copied
        else:
            view = memoryview(os.pread(source, min(CHUNK, end - done), done))
            if not view:
                raise OSError(errno.EIO, "the source became shorter while it was read")
            while view:
                written = os.pwrite(target, view, done)
                done, view = done + written, view[written:]
        advance(done)


class Follower:
    """Hashes a file while another thread is still writing it from front to back. Hashing lets other threads run."""

    def __init__(self, path: Path, size: int):
        self._path, self._size, self._ready, self._news = path, size, 0, threading.Condition()
        self._digest, self._error = hashlib.sha256(), None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ready(self, upto: int) -> None:
        """Everything before byte `upto` has been written for good."""
        with self._news:
            self._ready = max(self._ready, upto)
            self._news.notify()

    def _run(self) -> None:
        done, buffer = 0, memoryview(bytearray(CHUNK))
        try:
            with self._path.open("rb", buffering=0) as file:
                while done < self._size:
                    with self._news:
                        while self._ready <= done:
                            self._news.wait()
                        upto = self._ready
                    if upto > self._size:  # given up
                        return
                    while done < upto and (got := file.readinto(buffer[: min(CHUNK, upto - done)])):
                        self._digest.update(buffer[:got])
                        done += got
        except OSError as error:
            self._error = error

    def give_up(self) -> None:
        self.ready(self._size + 1)
        self._thread.join()

    def hexdigest(self) -> str:
        """Wait for the end. Raises OSError if the file could not be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder, empty, and hold it: a killed process lets go of it by itself. Removed again on an exception.

    Raises BlockingIOError if another process holds it.
    """
    import fcntl

    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What a killed run has left behind.
        for old in path.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        try:
            yield
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(handle)
