"""Run the tests of every model type and keep what they found for docs/models.md, or check that it is still so.

    python -m tests.models.table            run the tests, and write docs/models.json
    python -m tests.models.table --check    exit status 1 if a cell is missing, new, or says something else

Errors differ from machine to machine, so of a number only that it is there is checked: the test that found it has held
it to its limit.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.files import write_atomic
from tests.support.model_cells import FILE, stored

Cells = dict[str, dict[str, str]]


def found() -> Cells:
    """Run the tests, and return their cells. Exits with their status if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        tests = [f"tests/{room}/test_every_model.py" for room in ("models", "subspace", "certify")]
        words = ["-m", "pytest", "-q", "-m", "", "-n", "2", "--dist", "loadfile", *tests]
        done = subprocess.run([sys.executable, *words], env=os.environ | {"KERNEL_SURGERY_CELLS": folder}, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return stored(Path(folder))


def without_numbers(cells: Cells) -> Cells:
    """The same cells without figures that differ from machine to machine."""
    return {kind: {name: re.sub(r"\d+\.\d+", "", cell) for name, cell in row.items()} for kind, row in cells.items()}


def differences(was: Cells, now: Cells) -> list[str]:
    """Return a line for each model type whose cells are not what they were."""
    was, now = without_numbers(was), without_numbers(now)
    return [
        f"docs/models.json: {kind}: kept {was.get(kind)}, found {now.get(kind)}"
        for kind in sorted(was.keys() | now.keys())
        if was.get(kind) != now.get(kind)
    ]


def main(argv: list[str]) -> int:
    cells = found()
    if argv == ["--check"]:
        lines = differences(json.loads(FILE.read_text())["cells"], cells)
        print("\n".join(lines), file=sys.stderr)
        return int(bool(lines))
    about = environment_record()
    record = {name: about[name] for name in ("torch", "transformers", "device", "commit", "dirty")}
    record["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    write_atomic(FILE, json.dumps({"environment": record, "cells": cells}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
