"""The table of docs/engines.md: each cell is what a test found. `make engines` keeps them in docs/engines.json."""

import json
import os
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "docs" / "engines.json"
COLUMNS = ("loads", "texts", "mixed batch", "log probabilities", "tensor parallel 2", "compiled")


def store(model: str, mode: str, column: str, found: str) -> None:
    """Keep a cell in the folder that KERNEL_SURGERY_CELLS names, if it is set, in a small file of its own.

    found: what the test saw, in words.
    """
    assert column in COLUMNS
    if folder := os.environ.get("KERNEL_SURGERY_CELLS"):
        name = "-".join((model, mode, column)).replace(" ", "_").replace(",", "")
        held = {"model": model, "mode": mode, "column": column, "found": found}
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(held))


def stored(folder: Path) -> list[dict[str, str]]:
    """Return the cells that `store` kept in a folder, in the order of the table."""
    modes = ("original", "baked", "fused", "lora")
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda c: (c["model"], modes.index(c["mode"]), COLUMNS.index(c["column"])))
