"""Processes that share a command's work, as threads of the test: they exchange values through a list and a barrier."""

import threading
from dataclasses import dataclass, field

from kernel_surgery.common.ranks import Ranks


@dataclass(frozen=True)
class Threads(Ranks):
    board: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def _exchanged(self, message):
        self.board[self.rank] = message
        self.barrier.wait(20)
        answers = list(self.board)
        self.barrier.wait(20)
        return answers


def together(size, work):
    """`work(ranks)` of every process at once: what each returned, or the exception that ended it."""
    board, barrier, found = [None] * size, threading.Barrier(size), [None] * size

    def one(rank):
        try:
            found[rank] = work(Threads(rank, size, board, barrier))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found
