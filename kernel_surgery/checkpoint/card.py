"""The model card of a baked checkpoint."""

from pathlib import Path
from typing import Any

from kernel_surgery.checkpoint.record import (
    BASE_CARD,
    UNDO,
    by_layer,
    checked_by,
    damage_lines,
    header_lines,
    is_dequantised,
    is_requantised,
    spans,
    title_of,
)
from kernel_surgery.common.names import PROVENANCE

_KEPT = {
    False: "Every other tensor is byte-identical to the original.",
    True: "The original is quantised: its other quantised tensors were written as bfloat16, and the rest as they were.",
}
_UNDO = (
    f"`{UNDO.as_posix()}` holds the part that was removed. This command undoes the edit, to within rounding:",
    "",
    "    python -m kernel_surgery.bake --undo --model THIS --out RESTORED",
)
_REQUANTISED = "The edited matrices were quantised again in their own format, so the edit cannot be undone."
_BEFORE = "The damage was measured before that, and quantising may add to it."


def card_of(record: dict[str, Any], site: str, changed: str) -> str:
    """Return the model card, which says what the weights are and how to undo the edit.

    site: the edited module, from its layer on. changed: what was edited, in words.
    """
    model, layers, a = record["model_id"], record["layers"], record["strength"]
    requantised = [_REQUANTISED, *([_BEFORE] if record.get("damage", {}).get("neutral") else [])]
    lines = [
        *("---", *header_lines(record), "library_name: transformers", "tags: [kernel-surgery]", "---", ""),
        *(f"# {Path(model).name}, {title_of(record)}", "", *damage_lines(record)),
        f"These are the weights of {model} with one edit. In layers {layers[0]} to {layers[-1]} ({len(layers)} in all)",
        f"every matrix W that writes into the output of `{site}` became W - a A (B^T W): {changed}.",
        f"A and B have rank {record['rank']}, and a = {a:g}{by_layer(record)}. For an orthogonal edit, A = B.",
        *spans(record, "A", "B"),
        _KEPT[is_dequantised(record)],
        "",
        *([record["note"] + ".", ""] if record["note"] else []),
        f"`{PROVENANCE}` records the SHA-256 of every file and how the subspace was fitted.",
        *checked_by("--baked THIS", needed=is_requantised(record)),
        *(requantised if is_requantised(record) else _UNDO),
        "",
        f"The original model's card, if it had one, is `{BASE_CARD}`.",
    ]
    return "\n".join(lines) + "\n"
