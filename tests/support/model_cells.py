"""The table of docs/models.md: each cell is what a test found. `python -m tests.models.table` keeps them."""

import json
import os
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "docs" / "models.json"
COLUMNS = (
    *("collect", "hook", "fused", "baked in memory", "lora", "baked on disk", "undo", "certificate"),
    *("streamed certificate", "counted"),
)


def store(kind: str, cells: dict[str, str]) -> None:
    """Keep what a test found of a model type in the folder that KERNEL_SURGERY_CELLS names, if it is set."""
    assert set(cells) <= set(COLUMNS)
    if folder := os.environ.get("KERNEL_SURGERY_CELLS"):
        # A file of its own for each test: several may run at a time.
        file = Path(folder) / f"{kind}.{min(cells).replace(' ', '_')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(cells))


def stored(folder: Path) -> dict[str, dict[str, str]]:
    """Return {model type: {column: what was found}} of a folder."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.json")):
        cells = found.setdefault(file.name.partition(".")[0], {})
        cells |= json.loads(file.read_text())
    return found
