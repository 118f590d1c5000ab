"""Processes that share the work of one command: started by torchrun or `accelerate launch`, each with a share of it.

    torchrun --nproc-per-node 2 -m kernel_surgery.eval ...

Both set RANK and WORLD_SIZE. The processes exchange small values over gloo, on CPUs and GPUs alike; what is large lies
in files, so they need one folder that all can read. A process that finds an error tells the others, which then stop:
every exchange carries either a value or an error, so nobody waits for one that has stopped. A process that is killed is
noticed by the launcher, which ends the others.

Without these variables there is one process, and nothing here does anything.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from kernel_surgery.common.errors import KernelSurgeryError, UserError

T = TypeVar("T")

# Of one exchange. Process 0 may measure for hours while the others wait; who was killed is noticed without it.
_PATIENCE = timedelta(days=7)


class StoppedElsewhere(Exception):
    """Another process has found an error, and says so. This one has nothing to add."""


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes. rank: its number; 0 is the one that prints and writes what they made together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def record(self) -> dict[str, int]:
        """Return what a record says of the processes; nothing if there is one."""
        return {"processes": self.size} if self.size > 1 else {}

    def share(self, items: Sequence[T], rank: int | None = None) -> list[T]:
        """Return every `size`-th item, from the process's own number on. rank: of another process."""
        return list(items[self.rank if rank is None else rank :: self.size])

    def gathered(self, value: T) -> list[T]:
        """Return the value that each process gives, by rank. All processes must call it.

        Raises StoppedElsewhere if one of them calls `failed` instead.
        """
        if self.size == 1:
            return [value]
        answers = self._exchanged((True, value))
        if not all(good for good, _ in answers):
            self._exchanged((True, None))
            raise StoppedElsewhere
        return [value for _, value in answers]

    def agreed(self, value: T) -> T:
        """Return the value that process 0 gives. All processes must call it. Raises what `gathered` raises."""
        return self.gathered(value if self.first else None)[0]  # type: ignore[return-value]  # of process 0

    def parts(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` makes in each process, by rank. It may exchange nothing. All processes must call this.

        If `work` raises KernelSurgeryError in some of them, all raise that of the lowest rank, so all may go on from
        it. Raises what `gathered` raises.
        """
        if self.size == 1:
            return [work()]
        made: T | None = None
        error: KernelSurgeryError | None = None
        try:
            made = work()
        except KernelSurgeryError as found:
            error = found
        answers = self.gathered((made, error))
        for _, found_there in answers:
            if found_there is not None:
                raise found_there
        return [part for part, _ in answers]  # type: ignore[misc]  # there is no error, so each has made one

    def by_first(self, make: Callable[[], T]) -> T:
        """Return what process 0 makes; the others wait for it. All processes must call this. Raises as `parts`."""
        return self.parts(lambda: make() if self.first else None)[0]  # type: ignore[return-value]  # of process 0

    def wait(self) -> None:
        """Return when all processes are here. Raises what `gathered` raises."""
        self.gathered(None)

    def failed(self) -> bool:
        """Tell the others that this process stops with an error. Return whether it is the one that should print it.

        The caller prints it, and then calls `told`.
        """
        if self.size == 1:
            return True
        answers = self._exchanged((False, None))
        return self.rank == next(rank for rank, (good, _) in enumerate(answers) if not good)

    def told(self) -> None:
        """Let the others end, now that the error is printed: the launcher ends all when the first one is gone."""
        if self.size > 1:
            self._exchanged((True, None))

    def _exchanged(self, message: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        import torch.distributed as dist

        answers: list[tuple[bool, Any]] = [(True, None)] * self.size
        dist.all_gather_object(answers, message, group=_group())
        return answers


ALONE = Ranks()
_groups: list[Any] = []


def _group() -> Any:
    """Return the gloo group of all processes, made at the first exchange."""
    if not _groups:
        import torch.distributed as dist

        if dist.is_initialized():
            _groups.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
        else:
            dist.init_process_group("gloo", timeout=_PATIENCE)
            _groups.append(dist.group.WORLD)
    return _groups[0]


def close() -> None:
    """End the exchanges of this process. To leave them open at the end would let one process abort another."""
    if _groups:
        import torch.distributed as dist

        dist.destroy_process_group(_groups.pop())


def current() -> Ranks:
    """Return this process, as the launcher's variables say. Raises UserError if they make no sense."""
    rank, size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"RANK={rank!r} and WORLD_SIZE={size!r} name no process: unset them, or use a launcher.")
    return Ranks(int(rank), int(size)) if int(size) > 1 else ALONE


def silent() -> bool:
    """Return whether this process leaves it to process 0 to print."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"
