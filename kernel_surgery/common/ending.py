"""How a command ends: it says what it wrote, with the size, and the command that comes next, ready to be copied.

    wrote acts.safetensors (1.1 MB)
    next: python -m kernel_surgery.fit --activations acts.safetensors --out subspace.safetensors
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kernel_surgery.common.command import program
from kernel_surgery.common.files import in_bytes

Word = str | Path | int
_inside = False  # within a command that runs others: its own ending is the one that counts


@dataclass(frozen=True)
class Following:
    """A command that may come next: its name, its words, and what to know before it is run."""

    name: str
    words: Sequence[Word] = ()
    note: str = ""


def wrote(path: Path, names: Sequence[str] = (), file: TextIO | None = None) -> None:
    """Print what was written and its size. names: of the files in a folder that matter."""
    which = f": {', '.join(names)}" if names else ""
    print(f"wrote {quoted(path)}{which} ({in_bytes(size_of(path))})", file=file)


def read_it(path: Path) -> None:
    """Print the page that a person opens. Inside a command that runs others, print nothing."""
    if not _inside:
        print(f"open: {quoted(path)}")


def next_command(following: Following, file: TextIO | None = None) -> None:
    """Print the command that comes next. Inside a command that runs others, print nothing."""
    if _inside:
        return
    if following.note:
        print(following.note, file=file)
    print("next:", program(following.name), *map(quoted, following.words), file=file)


def look_at(words: str) -> None:
    """Print what to look at after a failed check, in place of a next command."""
    if not _inside:
        print(f"look at: {words}")


@contextmanager
def one_of_several() -> Iterator[None]:
    """Within the block, commands do not say what comes next: the command that runs them does."""
    global _inside
    before, _inside = _inside, True
    try:
        yield
    finally:
        _inside = before


def quoted(word: Word) -> str:
    """Return a word as a shell reads it. A path that looks like an option begins with ./"""
    if isinstance(word, Path) and str(word).startswith("-"):
        return shlex.quote(f"./{word}")
    return shlex.quote(str(word))


def strength_words(strength: float) -> list[Word]:
    """Return the option --strength of a strength that is not the default."""
    if strength == 1:
        return []
    exact = f"{strength:g}" if float(f"{strength:g}") == strength else repr(strength)
    # argparse takes -1e-05 for an option.
    return [f"--strength={exact}"] if strength < 0 else ["--strength", exact]


def free(path: Path) -> Path:
    """Return a path where there is nothing yet: `path`, or the first of path-2, path-3, ... that is free."""
    number, found = 1, path
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
