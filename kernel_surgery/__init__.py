"""Kernel Surgery: measure the language subspace of a multilingual LM, remove it, and check what changed.

    from kernel_surgery import Subspace, fused, load_model

The names are imported on first use (PEP 562). `import kernel_surgery` therefore loads neither torch nor transformers,
which together take longer to import than a command's `--help` may take.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kernel_surgery.common.names import VERSION as __version__

if TYPE_CHECKING:
    from kernel_surgery.certify.files import verify_checkpoint
    from kernel_surgery.certify.model import certify_model
    from kernel_surgery.checkpoint.adapter import write_adapter
    from kernel_surgery.checkpoint.baking import bake_checkpoint
    from kernel_surgery.common.errors import KernelSurgeryError
    from kernel_surgery.damage.measure import measure_damage
    from kernel_surgery.edit.baked import baked
    from kernel_surgery.edit.fused import fused
    from kernel_surgery.edit.hook import hooked
    from kernel_surgery.edit.lora import adapted
    from kernel_surgery.evaluation.run import evaluate
    from kernel_surgery.evaluation.sidebyside import compare_texts
    from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model, load_tokenizer
    from kernel_surgery.ops.library import project
    from kernel_surgery.subspace.artifact import Subspace
    from kernel_surgery.subspace.collecting import collect_activations, collect_moments
    from kernel_surgery.subspace.fitting import fit_subspace

__all__ = [
    "POLYGLOT_SUBSPACE",
    "KernelSurgeryError",
    "Subspace",
    "__version__",
    "adapted",
    "bake_checkpoint",
    "baked",
    "certify_model",
    "collect_activations",
    "collect_moments",
    "compare_texts",
    "evaluate",
    "fit_subspace",
    "fused",
    "hooked",
    "load_model",
    "load_tokenizer",
    "measure_damage",
    "project",
    "verify_checkpoint",
    "write_adapter",
]

# {name: the module that defines it}.
_HOME = {
    "POLYGLOT_SUBSPACE": "models.load",
    "KernelSurgeryError": "common.errors",
    "Subspace": "subspace.artifact",
    "adapted": "edit.lora",
    "bake_checkpoint": "checkpoint.baking",
    "baked": "edit.baked",
    "certify_model": "certify.model",
    "collect_activations": "subspace.collecting",
    "collect_moments": "subspace.collecting",
    "compare_texts": "evaluation.sidebyside",
    "evaluate": "evaluation.run",
    "fit_subspace": "subspace.fitting",
    "fused": "edit.fused",
    "hooked": "edit.hook",
    "load_model": "models.load",
    "load_tokenizer": "models.load",
    "measure_damage": "damage.measure",
    "project": "ops.library",
    "verify_checkpoint": "certify.files",
    "write_adapter": "checkpoint.adapter",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
