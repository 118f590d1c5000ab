"""Progress bars on stderr. They are silent if stderr is not a terminal, and in all processes but the first."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from kernel_surgery.common.ranks import silent

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], total: int | None = None, desc: str | None = None) -> Iterator[T]:
    """Return an iterator over the same items that shows a bar on stderr. A pipe or a log gets no output."""
    return iter(progress_bar(total, desc, iterable=iterable, leave=False))


def progress_bar(total: int | None, desc: str | None = None, **options: Any) -> "tqdm":
    """Return a bar on stderr: a context manager with `update`. options: further arguments of tqdm."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, file=sys.stderr, disable=not sys.stderr.isatty() or silent(), **options)
