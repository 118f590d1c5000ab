"""A collection that can be killed: its finished batches, in a folder beside the file that it will write.

    settings.json             what the collection is of. Another one does not go on from here.
    batch-00007.safetensors   the vectors of one batch, [layers, prompts, d_model]
    moments.safetensors       moments over all tokens so far, and how many batches they hold
    state.safetensors         of a fit layer by layer: what the next layer needs, and how many layers are done

Of several processes (`common.ranks`) each has every n-th batch and a folder of its own, FILE.0-of-2.partial. When all
are done, each of them reads the folders of all, in their order.

Vectors are written after every batch, so a kill loses one batch at most. Moments are as large after one batch as after
all of them: 8 layers d_model^2 bytes. They are written after every batch too, as long as all this writing takes
`GRACE_S` and a `SHARE` of the time at most. On a CPU it does. On a GPU, where a batch may take less time than writing a
gigabyte, they are written less often. A kill then loses the work since the last save: at most a batch and 1 / SHARE
times the time of a save. Either way the rest is computed as it would have been without the kill, bit for bit.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernel_surgery.common.errors import CheckpointError, UserError
from kernel_surgery.common.files import replacing, write_atomic
from kernel_surgery.common.names import BEFORE_CHAT
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.files.tensorfile import save_tensors
from kernel_surgery.subspace.moments import Moments

GRACE_S, SHARE = 2.0, 0.05  # saving moments takes at most so many seconds and this share of the time
SETTINGS, MOMENTS, STATE = "settings.json", "moments.safetensors", "state.safetensors"
_BATCH = re.compile(r"batch-(\d{5})\.safetensors")
# Of these settings the values are too long for a message.
_LONG = {"fingerprint": "the model's weights differ", "prompts": "the prompts' tokens differ"}
_NAMED = 3  # differences in one message


def partial_folder(out: Path, ranks: Ranks = ALONE, rank: int | None = None) -> Path:
    """Return the folder of the unfinished collection that will be written to `out`.

    ranks: the processes that share it. rank: of another process than this one.
    """
    number = ranks.rank if rank is None else rank
    return out.with_name(f"{out.name}.{number}-of-{ranks.size}.partial" if ranks.size > 1 else f"{out.name}.partial")


def refuse_other_launch(out: Path, ranks: Ranks, *, restart: bool = False) -> None:
    """Raise UserError if another number of processes has begun the collection of `out`; it would be left behind.

    restart: remove what they have left instead. All processes must call it.
    """
    own = {partial_folder(out, ranks, rank) for rank in range(ranks.size)}
    name = re.compile(rf"{re.escape(out.name)}(?:\.\d+-of-(\d+))?\.partial")
    there = {path: name.fullmatch(path.name) for path in out.parent.iterdir()} if out.parent.is_dir() else {}
    others = {path: int(found[1] or 1) for path, found in there.items() if found and path not in own}
    others = {path: size for path, size in others.items() if (path / SETTINGS).is_file()}
    if others and not restart:
        path, size = min(others.items())
        raise UserError(
            f"{str(path)!r} holds an unfinished collection of {size} {'processes' if size > 1 else 'process'}, and "
            f"this is a launch of {ranks.size}. To go on with it, start as many. To begin again, add --restart."
        )
    ranks.wait()
    if ranks.first:
        for path in others:
            shutil.rmtree(path)


def check_partial(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError if `folder` holds a collection with other settings, or something else.

    settings: those that are known. The others are not compared.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is in the way of finished batches: it is a file. Choose another --out.")
    begun = _settings(folder)
    if begun is None:
        if any(not _temporary(path) for path in folder.iterdir()):
            raise UserError(
                f"{str(folder)!r} is not an unfinished collection: it has no {SETTINGS}. Move it, or choose another "
                "--out."
            )
        return
    if differing := _differences(begun, settings):
        raise UserError(
            f"{str(folder)!r} holds an unfinished collection with other options: {differing}.\nTo go on with it, use "
            "the same options. To begin again, add --restart. To keep it, choose another --out."
        )


def _settings(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _temporary(path: Path) -> bool:
    """Return whether a killed `replacing` has left this file."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _differences(begun: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return in words what differs of the settings that both name; an empty text if nothing does."""
    found = []
    for name, value in json.loads(json.dumps(settings)).items():
        there = begun.get(name, BEFORE_CHAT.get(name))
        if there == value:
            continue
        if name in _LONG:
            found.append(_LONG[name])
        elif isinstance(value, dict) and isinstance(there, dict):
            pairs = {key: (there.get(key), value[key]) for key in value}
            found += [f"{key} is {a!r} there, {b!r} here" for key, (a, b) in pairs.items() if a != b]
        else:
            found.append(f"{name} is {there!r} there, {value!r} here")
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


class Partial:
    """The finished batches of one collection. Made by `resuming`.

    say: called with one line if there are some. clock: seconds. ranks: the processes that share the collection.
    folders: of all of them, if there are several.
    """

    def __init__(
        self,
        folder: Path,
        say: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
        ranks: Ranks = ALONE,
        folders: Sequence[Path] = (),
    ):
        self.folder, self.say, self.clock, self.ranks = folder, say, clock, ranks
        self.folders = folders or (folder,)
        self._began = self._saved_at = clock()
        self._saving = self._cost = 0.0  # of all saves, and of the last

    def begin(self, settings: Mapping[str, Any], total: int, unit: str = "batches") -> int:
        """Return how many of `total` batches (or layers: `unit`) are finished. Their collection has the same settings.

        Raises UserError as `check_partial` does.
        """
        settings = {**settings, **self.ranks.record()}
        check_partial(self.folder, settings)
        if _settings(self.folder) is None:
            write_atomic(self.folder / SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        finished = self._finished()
        if finished:
            self.say(f"{self.folder}: {finished} of {total} {unit} are done; going on from there")
        self._began = self._saved_at = self.clock()
        return finished

    def _finished(self) -> int:
        for name in (MOMENTS, STATE):
            if (self.folder / name).is_file():
                with self._opened(self.folder / name) as file:
                    return int((file.metadata() or {}).get("batches", 0))
        there = {int(found[1]) for path in self.folder.iterdir() if (found := _BATCH.fullmatch(path.name))}
        return next(number for number in range(len(there) + 1) if number not in there)

    def add_vectors(self, number: int, vectors: Tensor) -> None:
        """Keep the vectors of batch `number`, [layers, prompts, d_model] float32."""
        self._write(f"batch-{number:05}.safetensors", {"vectors": vectors}, {})

    def vectors(self, finished: int, rank: int | None = None) -> Iterator[Tensor]:
        """Yield the vectors of the first batches, as `add_vectors` got them. rank: of another process."""
        folder = self.folder if rank is None else self.folders[rank]
        for number in range(finished):
            with self._opened(folder / f"batch-{number:05}.safetensors") as file:
                yield file.get_tensor("vectors")

    def add_moments(self, finished: int, by_layer: Mapping[int, Moments], *, last: bool = False) -> bool:
        """Keep the moments over the first `finished` batches, unless that takes too much of the time.

        last: keep them in any case. Return whether they were kept.
        """
        began = self.clock()
        within = last or self._saving + self._cost <= GRACE_S + SHARE * (began - self._began)
        if not within and self._cost > SHARE * (began - self._saved_at):
            return False
        tensors = {f"L{i}.{name}": part.cpu() for i, m in by_layer.items() for name, part in vars(m).items()}
        self._write(MOMENTS, tensors, {"batches": str(finished)})
        self._saved_at = self.clock()
        self._cost = self._saved_at - began
        self._saving += self._cost
        return True

    def load_moments(self, by_layer: Mapping[int, Moments]) -> None:
        """Fill moments with those that are kept."""
        self._read_moments(self.folder, by_layer, Tensor.copy_)

    def sum_moments(self, by_layer: Mapping[int, Moments]) -> None:
        """Fill moments with the sum of those that all processes keep, when all are done. All must call it.

        Numerics: float64, process 0 first: the same bits in every process, and for the same number of processes.
        """
        self.ranks.wait()
        for number, folder in enumerate(self.folders):
            self._read_moments(folder, by_layer, Tensor.add_ if number else Tensor.copy_)

    def _read_moments(self, folder: Path, by_layer: Mapping[int, Moments], put: Callable[..., object]) -> None:
        with self._opened(folder / MOMENTS) as file:
            for layer, moments in by_layer.items():
                for name, part in vars(moments).items():
                    put(part, file.get_tensor(f"L{layer}.{name}").to(part.device))

    def add_state(self, finished: int, tensors: dict[str, Tensor]) -> None:
        """Keep the state after the first `finished` layers, in place of the one before."""
        self._write(STATE, tensors, {"batches": str(finished)})

    def load_state(self) -> dict[str, Tensor]:
        """Return the tensors that `add_state` got last."""
        with self._opened(self.folder / STATE) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def publish(self, save: Callable[[Path], object], out: Path) -> None:
        """Write the file of the whole collection to `out`, completely or not at all, and remove the folder.

        save: writes it to a path that it gets. Of several processes the first one writes; all must call it.
        """
        self.ranks.wait()  # all have read the folders of all
        if self.ranks.first:
            made = self.folder / "finished"
            save(made)
            _sync(made)
            os.replace(made, out)
            _sync(out.absolute().parent)
        self.ranks.wait()
        shutil.rmtree(self.folder)

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, "pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{str(file)!r} is damaged ({error}). Add --restart to begin the collection again."
            ) from error

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write one file, completely or not at all. It is on the disk when this returns."""
        with replacing(self.folder / name) as temporary:
            save_tensors(tensors, temporary, metadata=metadata)
            _sync(temporary)
        _sync(self.folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def resuming(
    folder: Path,
    *,
    restart: bool = False,
    say: Callable[[str], object] = lambda line: None,
    ranks: Ranks = ALONE,
    folders: Sequence[Path] = (),
) -> Iterator[Partial]:
    """Open or create the folder of a collection, and lock it within the block. An error in the block leaves it there.

    restart: remove what an earlier run has left. say, ranks, folders: as in `Partial`.

    Raises CheckpointError if another process holds the folder, and UserError if something else is in its place.
    """
    import fcntl

    check_partial(folder, {})
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is collecting into {str(folder)!r}. Wait until it is done, or choose another --out."
            ) from error
        for path in folder.iterdir():
            if restart or _temporary(path) or path.name == "finished":
                path.unlink()
        try:
            yield Partial(folder, say, ranks=ranks, folders=folders)
        finally:
            if created and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()  # nothing was begun
    finally:
        os.close(handle)
