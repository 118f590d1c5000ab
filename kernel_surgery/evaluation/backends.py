"""Who runs the model of an evaluation: this process with transformers, or an engine (`evaluation.served`).

`evaluate` needs the same six things of both: who writes the texts, the records of the edits, a digest of the weights, a
description of the model, the blocks that make the edits, and what is measured beside the texts.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kernel_surgery.damage.measure import headline
from kernel_surgery.edit.modes import applied, describe_edit, modes_of
from kernel_surgery.evaluation.answering import Asking, Context, EditBlock
from kernel_surgery.evaluation.controls import in_model
from kernel_surgery.evaluation.describing import describe_model
from kernel_surgery.evaluation.effects import measure_effects
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.samples import digest
from kernel_surgery.models.load import public_name
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backend(Protocol):
    """What `evaluate` needs of a loaded model, or of an engine."""

    @property
    def asking(self) -> Asking: ...

    def edits(self) -> dict[str, dict[str, Any]]:
        """Return {mode: the record of its edit as JSON}. An edit that cannot be made is found here."""
        ...

    def weights(self) -> str:
        """Return a digest of the model's weights."""
        ...

    def description(self) -> dict[str, Any]:
        """Return the model's entry in results.json."""
        ...

    def blocks(self) -> dict[str, EditBlock]:
        """Return {mode: the block that makes its edit}."""
        ...

    def for_controls(self) -> dict[str, Any]:
        """Return the last arguments of `controls.run_controls`."""
        ...

    def effects(self) -> dict[str, Any] | None:
        """Measure what is shown beside the texts: the damage, probes, leak. None if the options ask for none."""
        ...

    def in_words(self, effects: dict[str, Any] | None) -> str:
        """Return the first line of every output: what the edit did to the model."""
        ...

    def provider(self, edits: dict[str, dict[str, Any]]) -> str:
        """Return the code that ran: the fused operator's if it was used, else PyTorch's own operations."""
        ...


class Loaded:
    """A model that transformers has loaded into this process."""

    def __init__(self, context: Context, options: Options, subspace: Subspace | None):
        self.asking, self.options, self.subspace = context, options, subspace
        self.modes = modes_of(options.mode)

    @property
    def model(self) -> "PreTrainedModel":
        return self.asking.model

    def edits(self) -> dict[str, dict[str, Any]]:
        """Make and undo every edit once. Return {mode: its record as JSON}."""
        found = {}
        for mode, block in self.blocks().items():
            with block() as records:
                for edit in records:
                    found[mode] = describe_edit(edit)
        return found

    def weights(self) -> str:
        return digest(fingerprint(self.model))

    def description(self) -> dict[str, Any]:
        return describe_model(public_name(self.options.model), self.model)

    def blocks(self) -> dict[str, EditBlock]:
        given = (self.model, self.subspace, self.options.strength, self.options.force)
        return {mode: partial(applied, mode, *given) for mode in self.modes}

    def for_controls(self) -> dict[str, Any]:
        assert self.subspace is not None  # `Options.check`
        return in_model(self.asking, self.options.mode, self.subspace)

    def effects(self) -> dict[str, Any] | None:
        options = self.options
        if options.no_damage:
            return None
        about: dict[str, Any] = {"strength": options.strength, "seed": options.seed, "force": options.force}
        about["probed"] = options.strict
        return measure_effects(self.asking, self.modes, self.subspace, **about)

    def in_words(self, effects: dict[str, Any] | None) -> str:
        if self.options.mode == "original":
            return "damage: none, the model is not edited"
        return headline(effects, "--no-damage")

    def provider(self, edits: dict[str, dict[str, Any]]) -> str:
        return edits["fused"]["provider"] if "fused" in edits else f"aten/{self.model.device.type}"


# Called with the checkpoint's folder and configuration, before anything large is read.
Check = Callable[[Path, dict[str, Any]], object]
