"""Kernel Surgery: measure the language subspace of a multilingual LM, remove it, and prove what that did.

    from kernel_surgery import Subspace, project, hooked, baked, fused, adapted

The names are imported when first used (PEP 562): `import kernel_surgery` imports neither torch nor transformers,
which together take longer than a command's `--help` may.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernel_surgery.bake import baked
    from kernel_surgery.fuse import fused
    from kernel_surgery.hook import hooked
    from kernel_surgery.lora import adapted
    from kernel_surgery.ops import project
    from kernel_surgery.subspace import Subspace

__version__ = "0.1.0"
__all__ = ["Subspace", "__version__", "adapted", "baked", "fused", "hooked", "project"]
_HOME = {
    "Subspace": "subspace",
    "project": "ops",
    "hooked": "hook",
    "baked": "bake",
    "fused": "fuse",
    "adapted": "lora",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
