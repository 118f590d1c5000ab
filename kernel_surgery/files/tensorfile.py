"""Safetensors files as bytes: find a tensor, read or write one tensor, and copy the rest without decoding it.

An edit changes neither shapes nor dtypes, so a baked file has the same byte layout as its source. The file is copied in
the cheapest way that the filesystem offers. The edited tensors are then written over their old bytes. At most one
tensor is in memory at a time.
"""

import contextlib
import errno
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.common.files import mistaken
from kernel_surgery.files.hashing import CHUNK
from kernel_surgery.numerics.precision import STORED

_LARGEST_HEADER = 100 << 20  # the format's own limit
_FICLONE = 0x40049409  # Linux: share the blocks of a whole file (btrfs, xfs)
# {code in a file: dtype} of the tensors that can be read and edited.
EDITABLE = {stored.code: stored.dtype for stored in STORED.values()}
# The same of those that quantised matrices are made of.
QUANTISED = EDITABLE | {
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8},
    **{"I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
}
_BYTES = {code: dtype.itemsize for code, dtype in QUANTISED.items()} | {"I16": 2, "BOOL": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype code, its shape, and the offsets of its first and last byte (`end` excluded)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The header of a file, checked against the size of the file in bytes."""

    path: Path
    entries: dict[str, Entry]
    size: int


def save_tensors(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the permissions of any new file (0666 less the umask).

    safetensors writes through a temporary file that only its owner may read, and keeps its permissions. It wraps the
    errors of the file system; here they are OSErrors again.
    """
    Path(path).touch()
    mode = Path(path).stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata or None)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    os.chmod(path, mode & 0o777)


def reserve_tensors(
    path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, Entry]:
    """Make a safetensors file whose tensors are still zero, to be written one by one with `write_tensor`.

    shapes: {name: (dtype, shape)}. Returns the entries. The library writes a file only from all of its tensors at once,
    which would all be in memory.
    """
    codes = {stored.dtype: stored.code for stored in STORED.values()}
    return reserve(path, {name: (codes[dtype], shape) for name, (dtype, shape) in shapes.items()}, metadata)


def reserve(
    path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, Entry]:
    """Do what `reserve_tensors` does, with the codes of the dtypes. Raises KeyError for an unknown code."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    # Wider numbers first, as the library orders them: each begins at a multiple of its own size.
    for name, (code, shape) in sorted(shapes.items(), key=lambda item: -_BYTES[item[1][0]]):
        begin, end = end, end + math.prod(shape) * _BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library does: the numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return read_layout(path).entries


def read_layout(path: Path) -> Layout:
    """Read and check the header of a file.

    Raises FileNotFoundError, and CheckpointError for a file that is damaged or incomplete.
    """

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{str(path)!r} cannot be read as safetensors ({mistaken(path) or why}).")

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
            for e in header.values():
                if not all(type(n) is int and n >= 0 for n in (*e["shape"], *e["data_offsets"])):
                    raise TypeError(f"{e} holds something else than whole numbers")
                if not isinstance(e["dtype"], str):
                    raise TypeError(f"{e} has no dtype")
            entries = {
                name: Entry(name, e["dtype"], tuple(e["shape"]), *(start + offset for offset in e["data_offsets"]))
                for name, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError) as error:
            raise damaged(f"its header is invalid: {error}") from error
    for entry in entries.values():
        count = math.prod(entry.shape)
        width = _BYTES.get(entry.dtype)
        if width and entry.end - entry.begin != count * width:
            raise damaged(f"the position of {entry.name} does not fit its shape")
    end = max((entry.end for entry in entries.values()), default=start)
    if end != size:
        raise damaged(f"its tensors end at byte {end}, the file at {size}")
    try:
        # What the format's own library refuses is refused, so that whatever is made from the file can be loaded.
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise damaged(str(error)) from error
    return Layout(path, entries, size)


def rows_of(entry: Entry, start: int, stop: int) -> Entry:
    """Return the entry of the rows start .. stop of a tensor (`stop` excluded)."""
    width = (entry.end - entry.begin) // entry.shape[0]
    return Entry(
        f"{entry.name}[{start}:{stop}]",
        entry.dtype,
        (stop - start, *entry.shape[1:]),
        entry.begin + start * width,
        entry.begin + stop * width,
    )


def one_of(entry: Entry, number: int) -> Entry:
    """Return the entry of one of several tensors that are stacked along the first axis."""
    rows = rows_of(entry, number, number + 1)
    return replace(rows, shape=rows.shape[1:])


def read_tensor(file: int, entry: Entry, known: Mapping[str, torch.dtype] = EDITABLE) -> torch.Tensor:
    """Read one tensor of an open file into new memory. known: the dtypes that are expected.

    Raises CheckpointError for another dtype, by default one that is not a float, and OSError if the file ends early.
    """
    if entry.dtype not in known:
        raise CheckpointError(f"{entry.name} is stored as {entry.dtype}, not as a float")
    buffer = bytearray(entry.end - entry.begin)
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        n = os.preadv(file, [view[done:]], entry.begin + done)
        if n == 0:
            raise OSError(errno.EIO, f"{entry.name} ends early")
        done += n
    flat = torch.frombuffer(buffer, dtype=known[entry.dtype]) if buffer else torch.empty(0, dtype=known[entry.dtype])
    return flat.reshape(entry.shape)


def mapped(path: Path, entry: Entry) -> torch.Tensor:
    """Return one tensor without reading it: the operating system reads the pages that are used.

    Raises CheckpointError for a dtype that is not a float.
    """
    if entry.dtype not in EDITABLE:
        raise CheckpointError(f"{entry.name} is stored as {entry.dtype}, not as a float")
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=EDITABLE[entry.dtype])
    # "c": changes stay in memory. torch warns about memory that cannot be written.
    flat = np.memmap(path, np.uint8, "c", entry.begin, (entry.end - entry.begin,))
    return torch.from_numpy(flat).view(EDITABLE[entry.dtype]).reshape(entry.shape)


def write_tensor(file: int, entry: Entry, tensor: torch.Tensor) -> None:
    """Write a tensor over the bytes of an entry. Raises CheckpointError if its dtype or shape is not the entry's."""
    if tuple(tensor.shape) != entry.shape or tensor.dtype != QUANTISED.get(entry.dtype):
        raise CheckpointError(f"{entry.name} is {entry.dtype} {entry.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    view, done = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, 0
    while done < len(view):
        done += os.pwrite(file, view[done:], entry.begin + done)


def share_blocks(source: int, target: int) -> bool:
    """Let an empty open file share the blocks of another. A block is copied only when it is written.

    Return False if the filesystem cannot do this. source, target: file descriptors.
    """
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        fcntl.ioctl(target, _FICLONE, source)
        return True
    return False


def copy_range(source: int, target: int, begin: int, end: int, advance: Callable[[int], object]) -> None:
    """Copy the bytes begin .. end of an open file to the same offsets of another. Raises OSError.

    The operating system copies them without passing them through this process, if it can. source, target: file
    descriptors. advance: called with the offset of the copy after each chunk, of at most 64 MiB.
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


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """Open a safetensors file within the block.

    Raises FileNotFoundError, and CheckpointError if the file is damaged. Both name the file.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{str(file)!r} cannot be read as safetensors ({error}).") from error
