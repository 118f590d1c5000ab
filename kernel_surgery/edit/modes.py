"""The modes by name: "original", and the four ways to make the edit.

"hook" is plain PyTorch, "fused" an operator, "baked" changes the weights, "lora" adds an adapter.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from kernel_surgery.common.names import MODES
from kernel_surgery.edit.baked import baked
from kernel_surgery.edit.fused import fused
from kernel_surgery.edit.hook import hooked
from kernel_surgery.edit.lora import adapted
from kernel_surgery.edit.plan import Edit, SubspaceLike

# {mode: the context manager that makes its edit}, called as applier(model, subspace, strength, force=...).
APPLIERS: dict[str, Callable[..., AbstractContextManager[Edit]]] = {
    "hook": hooked,
    "fused": fused,
    "baked": baked,
    "lora": adapted,
}


def modes_of(name: str) -> list[str]:
    """Return the modes that `--mode name` compares: the original and the named one, or all of them."""
    return list(MODES) if name == "all" else list(dict.fromkeys(["original", name]))


def applier_of(mode: str) -> Callable[..., AbstractContextManager[Edit]]:
    """Return the context manager that makes a mode's edit. Raises KeyError for "original"."""
    return APPLIERS[mode]


@contextmanager
def applied(
    mode: str, model: nn.Module, subspace: SubspaceLike | None, strength: float, force: bool = False
) -> Iterator[tuple[Edit, ...]]:
    """Edit the model by the named mode while the block runs.

    Yields a tuple with the record of the edit, or an empty tuple for "original". subspace, strength, force: as in
    `edit.hook.hooked`. Raises what the mode's context manager raises.
    """
    if mode == "original":
        yield ()
        return
    with applier_of(mode)(model, subspace, strength, force=force) as edit:
        yield (edit,)


def describe_edit(edit: Edit) -> dict[str, Any]:
    """Return the JSON form of an edit's record, as results.json holds it."""
    return {
        "provider": edit.provider,
        "layers": list(edit.layers),
        "strength": edit.strength,
        "schedule": {str(layer): factor for layer, factor in edit.schedule.items()},
        "note": edit.note,
        "norms": {str(layer): list(pair) for layer, pair in (edit.norms or {}).items()},
        "reach": {str(layer): reach for layer, reach in edit.reach.items()},
        "fallbacks": {str(layer): reason for layer, reason in edit.fallbacks.items()},
    }
