"""SHA-256 of files, including files that another thread is still writing."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

CHUNK = 16 << 20
BLOCK = 1 << 18  # as hashlib.file_digest reads, which cannot show how far it is


class Follower:
    """Hash a file in a thread while another thread writes it from front to back. Hashing releases the GIL."""

    def __init__(self, path: Path, size: int):
        self._path, self._size, self._ready, self._news = path, size, 0, threading.Condition()
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ready(self, upto: int) -> None:
        """Announce that all bytes before `upto` are final."""
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
                    if upto > self._size:  # give_up was called
                        return
                    while done < upto and (n := file.readinto(buffer[: min(CHUNK, upto - done)])):
                        self._digest.update(buffer[:n])
                        done += n
        except OSError as error:
            self._error = error

    def give_up(self) -> None:
        self.ready(self._size + 1)
        self._thread.join()

    def hexdigest(self) -> str:
        """Wait for the thread, and return the hex SHA-256. Raises OSError if the file could not be read."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()


def sha256(path: Path, advance: Callable[[int], object] = lambda n: None) -> str:
    """Return the hex SHA-256 of a file. advance: called with the number of bytes that were just read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
            advance(n)
    return digest.hexdigest()
