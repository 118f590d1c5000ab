"""The folder of an evaluation: its configuration, its texts, and how an interrupted run continues.

config.json holds everything that the texts depend on. samples.jsonl holds the texts. A *cell* is the texts of one mode
in one language, in problem order. It is appended as a whole when it is finished, so a killed run loses only the cell it
was working on.

A run continues only if everything that a text depends on is unchanged: options, weights, subspace, prompts, versions.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import check_folder, write_atomic
from kernel_surgery.common.names import BEFORE_CHAT, BEFORE_ENGINES
from kernel_surgery.problems.generator import Problem

OUTPUTS = ("samples.jsonl", "results.json", "report.html")
Cell = list[dict[str, Any]]


def digest(value: object) -> str:
    """Return the SHA-256 of a value's JSON, to recognise the value later."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Create the folder of a run with its config.json. Raises what `check_run` raises, before anything is written."""
    check_run(folder, config, resume=resume)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def check_run(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Check that a run can be written to `folder` or, with `resume`, that the folder holds this run. Changes nothing.

    config: what is known of the run so far.

    Raises UserError for a folder that cannot be written, that holds another run, that holds a run although `resume` is
    not set, or that holds our output files without a config.json.
    """
    check_folder(folder)
    file = folder / "config.json"
    if not file.exists():
        if strays := [name for name in OUTPUTS if (folder / name).exists()]:
            raise UserError(
                f"{str(folder)!r} holds {strays[0]} but no config.json, so it is not a run of this command. "
                "Choose another --out."
            )
        return
    if not resume:
        raise UserError(f"{str(folder)!r} already holds a run. Continue it with --resume, or choose another --out.")
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}). Choose another --out.") from error
    silent: dict[str, Any] = {**BEFORE_CHAT, **BEFORE_ENGINES}
    for key, value in {**BEFORE_ENGINES, **json.loads(json.dumps(config))}.items():
        was = old.get(key, silent.get(key))
        if was != value:
            raise UserError(
                f"{str(folder)!r} holds a run with other settings: {key} was {was!r}, now {value!r}. Use "
                "the options of that run, or choose another --out."
            )


def read_cells(samples: Path, asked: Sequence[Problem]) -> dict[tuple[str, str], Cell]:
    """Return the complete cells of a samples.jsonl: those with exactly the prompts of `asked`, in order.

    Cells that a kill left incomplete are dropped.
    """
    cells: dict[tuple[str, str], Cell] = {}
    # Read bytes: a kill may have cut a character in half. Split at line feeds only: a text may contain U+2028.
    for line in samples.read_bytes().split(b"\n") if samples.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            sample = json.loads(line)
            cells.setdefault((sample["mode"], sample["language"]), []).append(sample)

    def whole(language: str, cell: Cell) -> bool:
        expected = [(p.id, p.prompts.get(language)) for p in asked]
        return [(s.get("id"), s.get("prompt")) for s in cell] == expected

    return {key: cell for key, cell in cells.items() if whole(key[1], cell)}


def write_cells(samples: Path, cells: dict[tuple[str, str], Cell]) -> None:
    """Replace the file with one that holds exactly these cells."""
    write_atomic(samples, "".join(map(_line, (s for cell in cells.values() for s in cell))))


def append_cell(samples: Path, cell: Cell) -> None:
    """Append one finished cell and wait until it is on disk."""
    with samples.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, cell))
        file.flush()
        os.fsync(file.fileno())


def take_up(
    samples: Path, asked: Sequence[Problem], score: Callable[[Problem, dict[str, Any]], dict[str, Any]]
) -> dict[tuple[str, str], Cell]:
    """Return the complete cells of an interrupted run, scored again. The file then holds only those.

    score: called as `score(problem, sample)`. The stored texts are kept, but their verdicts must come from the current
    code.
    """
    cells = {
        key: [score(problem, sample) for problem, sample in zip(asked, cell, strict=True)]
        for key, cell in read_cells(samples, asked).items()
    }
    if samples.exists():
        write_cells(samples, cells)
    return cells


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"
