"""A checkpoint's tensors on disk, under the names that the loaded model gives them."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.files.contents import weight_files
from kernel_surgery.files.tensorfile import Entry, Layout, read_layout
from kernel_surgery.models.architectures import LLAMA


def layouts(folder: Path) -> list[Layout]:
    """Return the headers of a checkpoint's weight files, with the tensors under the model's names.

    An inner model that was saved alone lacks "model." before its names; transformers adds it, and so do we.

    Raises FileNotFoundError for a missing file, and CheckpointError for a damaged one, and for a tensor in two files.
    """
    found, place = [read_layout(file) for file in weight_files(folder)], dict[str, Path]()
    for layout in found:
        if twice := sorted(place.keys() & layout.entries.keys()):
            files = f"{place[twice[0]].name} and {layout.path.name}"
            raise CheckpointError(f"{str(folder)!r}: {twice[0]} is in two of its weight files, {files}.")
        place |= dict.fromkeys(layout.entries, layout.path)
    inner, _, embedding = LLAMA.embedding.partition(".")
    if f"{LLAMA.embedding}.weight" not in place and f"{embedding}.weight" in place:
        found = [_prefixed(layout, f"{inner}.") for layout in found]
    return found


def _prefixed(layout: Layout, prefix: str) -> Layout:
    whole = {name: name if name.startswith(f"{LLAMA.head}.") else prefix + name for name in layout.entries}
    entries = {whole[name]: dataclasses.replace(entry, name=whole[name]) for name, entry in layout.entries.items()}
    return dataclasses.replace(layout, entries=entries)


def located(folder: Path) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor of a checkpoint. Raises what `layouts` raises."""
    return places(layouts(folder))


def places(found: Iterable[Layout]) -> dict[str, tuple[Path, Entry]]:
    """Return the place of every tensor of some weight files: {name: (file, entry)}."""
    return {name: (layout.path, entry) for layout in found for name, entry in layout.entries.items()}
