"""The tables of docs/models.md: what tests of every model type found (`tests.models.table`), and what is refused."""

import json

from bench.tables import table
from kernel_surgery.models.listing import what_follows
from kernel_surgery.models.table import ARCHITECTURES, REFUSED


def found() -> str:
    """docs/models.md: what the tests found, a row for each model type."""
    from tests.support.model_cells import COLUMNS, FILE

    if not FILE.is_file():
        return ""
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    body = [
        [f"`{kind}`", f"`{ARCHITECTURES[kind].site}`", what_follows(ARCHITECTURES[kind])]
        + [cells.get(column, "") for column in COLUMNS]
        for kind, cells in sorted(kept["cells"].items())
    ]
    about = kept["environment"]
    versions = f"torch {about['torch']}, transformers {about['transformers']}, {about['device']}"
    head = ["model type", "edited output", "what follows", *COLUMNS]
    return table(head, body) + f"\n{versions}, commit {about['commit'][:10]}, {about['date'][:10]}.\n"


def refused() -> str:
    """docs/models.md: the model types that are refused by name, with the reason."""
    return table(["model type", "why"], [[f"`{kind}`", f"{why}."] for kind, why in sorted(REFUSED.items())])
