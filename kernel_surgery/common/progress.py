"""Progress on stderr: bars for work that can be counted, a clock for work that cannot.

Both are silent if stderr is not a terminal, and in all processes but the first.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from kernel_surgery.common.ranks import silent

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
QUIET_S = 0.5  # seconds without a clock, and between its ticks: what is faster needs none
_COLUMNS, _ROWS = 100, 24  # of a terminal that does not say how large it is


def shown() -> bool:
    """Return whether progress is shown: stderr is a terminal, and this is the first process."""
    return sys.stderr.isatty() and not silent()


def progress(iterable: Iterable[T], total: int | None = None, desc: str | None = None) -> Iterator[T]:
    """Return an iterator over the same items that shows a bar on stderr. A pipe or a log gets no output."""
    return iter(progress_bar(total, desc, iterable=iterable, leave=False))


def progress_bar(total: int | None, desc: str | None = None, **options: Any) -> "tqdm":
    """Return a bar on stderr: a context manager with `update`. options: further arguments of tqdm."""
    from tqdm import tqdm

    if shown() and not _has_size():
        options = {"ncols": _COLUMNS, "nrows": _ROWS} | options  # tqdm would draw a bar of no width
    return tqdm(total=total, desc=desc, file=sys.stderr, disable=not shown(), **options)


def _has_size() -> bool:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # no terminal after all
        return False


@contextmanager
def waiting(words: str) -> Iterator[None]:
    """Show `words` and the seconds so far on stderr while the block runs, if it takes longer than `QUIET_S`.

    For work whose end cannot be foreseen, such as loading a model. The line is erased at the end. While a bar is on the
    screen there is no clock: the bar says what is going on.
    """
    if not shown():
        yield
        return
    done = threading.Event()
    clock = threading.Thread(target=_tick, args=(words, done), daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()


def _tick(words: str, done: threading.Event) -> None:
    started, drawn = time.monotonic(), False
    while not done.wait(QUIET_S):
        if not _bars():
            sys.stderr.write(f"\r{words} ({time.monotonic() - started:.0f} s)\x1b[K")
            sys.stderr.flush()
            drawn = True
    if drawn and not _bars():
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _bars() -> bool:
    """Return whether a bar of tqdm is on the screen."""
    module = sys.modules.get("tqdm")
    return bool(module and getattr(module.tqdm, "_instances", None))
