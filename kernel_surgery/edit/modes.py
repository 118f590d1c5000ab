"""The modes by name: the original, and the four places where the edit can be made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from kernel_surgery.common.names import MODES
from kernel_surgery.edit.baked import baked
from kernel_surgery.edit.fused import fused
from kernel_surgery.edit.hook import hooked
from kernel_surgery.edit.lora import adapted
from kernel_surgery.edit.plan import Edit, SubspaceLike

APPLIERS = {"hook": hooked, "fused": fused, "baked": baked, "lora": adapted}


def modes_of(name: str) -> list[str]:
    """The modes that a run of `--mode name` compares: the original, and the one named or all."""
    return list(MODES) if name == "all" else list(dict.fromkeys(["original", name]))


def applier_of(mode: str) -> Callable:
    """The context manager that makes a mode's edit."""
    return APPLIERS[mode]


@contextmanager
def applied(
    mode: str, model: nn.Module, subspace: SubspaceLike | None, strength: float, force: bool = False
) -> Iterator[tuple[Edit, ...]]:
    """Inside the block, the model has the edit of a mode. Yields its record; nothing for "original"."""
    if mode == "original":
        yield ()
        return
    with applier_of(mode)(model, subspace, strength, force=force) as edit:
        yield (edit,)


def describe_edit(edit: Edit) -> dict:
    """What results.json says of one applied edit."""
    return {
        "provider": edit.provider,
        "layers": list(edit.layers),
        "strength": edit.strength,
        "note": edit.note,
        "norms": {str(layer): list(pair) for layer, pair in (edit.norms or {}).items()},
        "reach": {str(layer): reach for layer, reach in edit.reach.items()},
        "fallbacks": {str(layer): reason for layer, reason in edit.fallbacks.items()},
    }
