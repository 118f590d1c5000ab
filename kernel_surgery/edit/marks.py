"""Marks on modules that are being edited: blocks may be nested, but not end in any order, and a copy keeps its edit.

Two blocks may edit one layer. The inner one then edits what the outer one made: y becomes P2 P1 y. For that, the inner
one must be of mode hook or fused, or the outer one of mode baked; other pairs are refused, because lora and baked start
from the weights. A baked block must end after those inside it. The others may end in any order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.models.architectures import Site
from kernel_surgery.models.shards import local

_MARKS = "_kernel_surgery_edits"  # an edited module's list of marks, the outermost block first


class Mark:
    """One block that edits one module.

    owner: the id of that module. None in a copy: a module that was copied or unpickled is not the one that was marked.
    originals: (parameter, its value before), which a baked block puts back. Of a parameter that is split over processes
    it is this process's part.
    """

    def __init__(self, mode: str, owner: int | None):
        self.mode, self.owner = mode, owner
        self.originals: list[tuple[Tensor, Tensor]] = []

    def __reduce__(self) -> tuple[type["Mark"], tuple[str, None]]:
        return Mark, (self.mode, None)  # copy.deepcopy and pickle


def marks_of(module: nn.Module) -> list[Mark]:
    """Return the marks of a module, the outermost block first."""
    return vars(module).get(_MARKS, [])


def refuse_copy(site: Site[Any]) -> None:
    """Raise KernelSurgeryError for a module that was copied inside a block: it keeps the block's edit."""
    if any(mark.owner != id(site.module) for mark in marks_of(site.module)):
        raise KernelSurgeryError(
            f"cannot edit {site.name}: this model is a copy that was made inside a block of mode "
            f"{marks_of(site.module)[0].mode}, and keeps its edit. The model is unchanged. Copy the model before the "
            "block."
        )


@contextmanager
def marked(sites: Iterable[Site[Any]], mode: str) -> Iterator[dict[int, Mark]]:
    """Mark modules as edited while the block runs. Yields {layer: mark}.

    Raises KernelSurgeryError for a mode that cannot be inside the blocks that are open.
    """
    sites = list(sites)
    if mode in ("baked", "lora"):
        for site in sites:
            if outer := [mark.mode for mark in marks_of(site.module) if mark.mode != "baked"]:
                raise KernelSurgeryError(
                    f"cannot edit {site.name} in mode {mode} inside a block of mode {outer[-1]}: mode {mode} starts "
                    "from the weights, not from what that block makes of them. The model is unchanged. Use mode hook "
                    "or fused for the inner block."
                )
    marks = {site.layer: Mark(mode, id(site.module)) for site in sites}
    for site in sites:
        vars(site.module).setdefault(_MARKS, []).append(marks[site.layer])
    try:
        yield marks
    finally:
        for site in sites:
            found = marks_of(site.module)
            found.remove(marks[site.layer])
            if not found:
                del vars(site.module)[_MARKS]


def put_back(site: Site[Any], mark: Mark) -> str | None:
    """Put a baked module's original weights back. Return the mode of a block that ought to have ended before, or None.

    If that block is baked too, it holds the weights of this one: it gets the originals, and puts them back at its end.
    """
    found = marks_of(site.module)
    later = found[found.index(mark) + 1 :]
    heir = next((inner for inner in later if inner.mode == "baked"), None)
    with torch.no_grad():
        for parameter, original in reversed(mark.originals):
            if heir is None:
                local(parameter).copy_(original)
            else:
                heir.originals = [(p, original if p is parameter else value) for p, value in heir.originals]
    mark.originals.clear()
    return later[-1].mode if later else None
