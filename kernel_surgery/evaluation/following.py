"""What may come after an edit was measured: keep it, or, where it breaks the model, another one."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kernel_surgery.common.ending import Following, Word, free, strength_words
from kernel_surgery.common.names import ERASING, WRITE
from kernel_surgery.damage.words import BROKEN
from kernel_surgery.evaluation.options import Options
from kernel_surgery.models.gguf import is_gguf
from kernel_surgery.models.load import POLYGLOT_SUBSPACE
from kernel_surgery.subspace.artifact import Subspace


@dataclass(frozen=True)
class Measured:
    """An edit that was measured.

    model: as given to --model. file: of the subspace. damage: the "damage" of a result, or None.
    """

    model: str
    file: Path
    mode: str
    strength: float
    damage: dict[str, Any] | None
    force: bool = False

    @property
    def broken(self) -> bool:
        """Whether the edit breaks the model."""
        verdicts = ((self.damage or {}).get("verdict") or {}).values()
        return any(verdict["word"] == BROKEN for verdict in verdicts)

    def following(self) -> Following:
        """Return the command that comes next: it keeps the edit, or tries another if this one breaks the model."""
        subspace = Subspace.load(self.file, force=True)
        return self._milder(subspace) if self.broken else self._kept(subspace)

    def _milder(self, subspace: Subspace) -> Following:
        method = (subspace.fit or {}).get("method")
        if abs(self.strength) <= 1 and method is not None and method not in ERASING:
            note = "The edit breaks the model. The default method of fit does less damage; it needs these activations:"
            return Following("collect", ["--model", self.model, "--out", free(Path("acts.safetensors"))], note)
        milder = 1.0 if self.strength > 1 else self.strength / 2
        note = "The edit breaks the model. Try fewer layers or a lower rank (fit --layers, --rank), or less strength:"
        words: list[Word] = ["--mode", self.mode, *self._edit(), *strength_words(milder)]
        return Following("eval", [*words, *(["--force"] if self.force else [])], note)

    def _kept(self, subspace: Subspace) -> Following:
        edit: list[Word] = [*self._edit(), *strength_words(self.strength), *(["--force"] if self.force else [])]
        if is_gguf(self.model):
            note = "A GGUF file is packed. To keep the edit, make a checkpoint of it first:"
            return Following("dequantize", [self.model, "--out", free(Path(Path(self.model).stem))], note)
        if subspace.form == "affine" or subspace.site == WRITE:
            return Following("verify", edit)  # files can rarely hold such an edit
        if self.mode == "lora" or quantised(self.model):
            return Following("lora", [*edit, "--out", free(Path("adapter"))])
        return Following("bake", [*edit, "--out", free(Path("edited"))])

    def _edit(self) -> list[Word]:
        return ["--model", self.model, "--subspace", self.file]


def quantised(model: str) -> bool:
    """Return whether a local model is quantised. Its weights are edited in an adapter without a further rounding."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return False
    return bool(json.loads(file.read_text(encoding="utf-8")).get("quantization_config"))


def after_evaluation(options: Options, results: dict[str, Any]) -> Following:
    """Return the command that comes after an evaluation. options: as they were used. results: of results.json."""
    model = options.model
    if options.mode == "original":
        if model == "polyglot":
            return Following("eval", ["--mode", "fused"])
        return Following("collect", ["--model", model, "--out", free(Path("acts.safetensors"))])
    if options.written is not None:
        folder, kind = options.written
        if options.certificate is None:
            return Following("verify", [f"--{kind}", folder, "--model", model])
        return Following("eval", ["--mode", "original", "--model", model], "The same model without the edit:")
    mode = "fused" if options.mode == "all" else options.mode
    file = options.subspace or POLYGLOT_SUBSPACE
    following = Measured(model, file, mode, options.strength, results["damage"], options.force).following()
    worse = dict.fromkeys(row["language"] for row in results["paired"] if row["verdict"] == "worse")
    if worse and not following.note:
        where = ", ".join(worse)
        return replace(following, note=f"The edited model solves fewer problems ({where}). To keep it all the same:")
    return following


def after_study(declared: dict[str, Any], folder: Path, study: dict[str, Any]) -> Following:
    """Return the command that comes after a study. declared: of `read_grid`. study: the contents of study.json."""
    strength = float(study["frozen"]["setting"].get("strength", 1.0))  # a search has a schedule in the subspace instead
    file = folder / "chosen.safetensors"
    return Measured(declared["model"], file, declared["mode"], strength, study["damage"]).following()
