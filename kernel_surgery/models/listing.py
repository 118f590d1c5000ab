"""The table of architectures as text, for `kernel_surgery.collect --list-models`. Reads neither torch nor a file."""

from collections.abc import Iterator

from kernel_surgery.models.table import ARCHITECTURES, REFUSED, Layout

_FOLLOWS = {
    "residual": "added to the residual stream",
    "parallel": "added to the residual stream together with attention's",
    "norm": "a norm, then added",
}
_ROLES = {"dense": "matrix", "expert": "routed experts", "shared": "shared expert"}


def what_follows(layout: Layout) -> str:
    """Return in words what is done with the edited output."""
    scaled = f", times {layout.scaled}" if layout.scaled else ""
    return _FOLLOWS[layout.follows] + scaled + (f" (if {layout.parallel_if})" if layout.parallel_if else "")


def what_writes(layout: Layout) -> str:
    """Return in words which tensors are edited. A bias is one that the model may have."""
    matrices = list(dict.fromkeys(_ROLES[form.role] for form in layout.writes if not form.bias))
    if len(matrices) > 1 and "matrix" in matrices:
        matrices.remove("matrix")
        matrices.append("dense layers between")
    return ", ".join(matrices)


def lines() -> Iterator[str]:
    """Yield the lines of the table, and what is refused with the reason."""
    rows = [("model type", "edited output", "what writes it", "what follows")]
    rows += [(kind, row.site, what_writes(row), what_follows(row)) for kind, row in sorted(ARCHITECTURES.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        yield "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[3]])
    yield ""
    yield "refused, and what it would need:"
    for kind, why in sorted(REFUSED.items()):
        yield f"{kind.ljust(widths[0])}  {why}"
