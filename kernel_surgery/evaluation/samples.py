"""An evaluation's folder: what was asked (config.json), every text as it is finished (samples.jsonl), and going on.

A *cell* is the texts of one mode in one language, in problem order. It is appended as a whole when it is finished, so
a kill loses the cell it fell into and no other. Going on is refused unless everything that a text depends on is the
same: options, weights, subspace, prompts, versions.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.problems.generator import Problem

OUTPUTS = ("samples.jsonl", "results.json", "report.html")
Cell = list[dict]


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, for recognising it again."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def open_run(folder: Path, config: dict, *, resume: bool) -> None:
    """Make `folder` the run's, with config.json in it, or find that run there if `resume`.

    Raises UserError, with nothing changed, for a folder that holds another run, a run that `resume` did not ask for,
    or files of ours without a run.
    """
    file = folder / "config.json"
    if not file.exists():
        if found := [name for name in OUTPUTS if (folder / name).exists()]:
            raise UserError(
                f"{str(folder)!r} holds {found[0]} but no config.json: not a run of this command. It was left as it "
                "is. Choose another --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return
    if not resume:
        raise UserError(
            f"{str(folder)!r} holds a run already; it was left as it is. Go on with it (--resume), or choose another "
            "--out."
        )
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}). It was left as it is.") from error
    for key, value in json.loads(json.dumps(config)).items():
        if old.get(key) != value:
            raise UserError(
                f"{str(folder)!r} holds a run with other settings: {key} was {old.get(key)!r}, now {value!r}. It was "
                "left as it is. Give the options it was started with, or choose another --out."
            )


def read_cells(samples: Path, asked: Sequence[Problem]) -> dict[tuple[str, str], Cell]:
    """The whole cells of a samples.jsonl: exactly the prompts of `asked`, in order. What a kill cut off is dropped."""
    cells: dict[tuple[str, str], Cell] = {}
    # Bytes, and split at line feeds alone: a kill may cut a character in half, and a text may hold U+2028.
    for line in samples.read_bytes().split(b"\n") if samples.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            sample = json.loads(line)
            cells.setdefault((sample["mode"], sample["language"]), []).append(sample)

    def whole(language: str, cell: Cell) -> bool:
        wanted = [(p.id, p.prompts.get(language)) for p in asked]
        return [(s.get("id"), s.get("prompt")) for s in cell] == wanted

    return {key: cell for key, cell in cells.items() if whole(key[1], cell)}


def write_cells(samples: Path, cells: dict[tuple[str, str], Cell]) -> None:
    """The file with these cells and nothing else, replaced as a whole."""
    write_atomic(samples, "".join(map(_line, (s for cell in cells.values() for s in cell))))


def append_cell(samples: Path, cell: Cell) -> None:
    """Add one finished cell, on disk before anything else happens."""
    with samples.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, cell))
        file.flush()
        os.fsync(file.fileno())


def take_up(
    samples: Path, asked: Sequence[Problem], score: Callable[[Problem, dict], dict]
) -> dict[tuple[str, str], Cell]:
    """The whole cells of an interrupted run, scored again by `score(problem, sample)`; the file holds only them then.

    Scored again because a verdict belongs to the code that runs now; the texts are what was kept.
    """
    cells = {
        key: [score(problem, sample) for problem, sample in zip(asked, cell, strict=True)]
        for key, cell in read_cells(samples, asked).items()
    }
    if samples.exists():
        write_cells(samples, cells)
    return cells


def _line(sample: dict) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"
