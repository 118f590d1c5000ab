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
        file = Path(folder) / f"{kind}.json"
        held = json.loads(file.read_text()) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(held | cells))


def stored(folder: Path) -> dict[str, dict[str, str]]:
    """Return {model type: {column: what was found}} of a folder."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
