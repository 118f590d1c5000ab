"""Progress bars on stderr, quiet where stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], total: int | None = None, desc: str | None = None) -> Iterator[T]:
    """The same items, with a bar on stderr while that is a terminal; nothing at all in a pipe or a log."""
    return iter(progress_bar(total, desc, iterable=iterable, leave=False))


def progress_bar(total: int | None, desc: str | None = None, **options) -> "tqdm":
    """A bar on stderr while that is a terminal: a context manager with `update`. options: tqdm's own."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, file=sys.stderr, disable=not sys.stderr.isatty(), **options)
