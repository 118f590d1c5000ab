"""What a study reports of its choice on the test half: beside the baseline, the original and random edits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_surgery.common.names import WRITE
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.measure import random_edits
from kernel_surgery.damage.words import HAAR, MATCHED
from kernel_surgery.studies.measuring import Measuring, difference, first_problems
from kernel_surgery.studies.opening import Study
from kernel_surgery.studies.settings import Setting
from kernel_surgery.studies.space import BASELINE, Search
from kernel_surgery.subspace.artifact import Subspace

CHOSEN, ORIGINAL = "chosen", "original"
MEASURED = "measured.json"


@dataclass(frozen=True)
class Reporting:
    """Measures edits on dev and on test. controls: random edits of each kind. ranks: the processes that share it."""

    dev: Measuring
    test: Measuring
    folder: Path
    controls: int
    ranks: Ranks = ALONE

    @classmethod
    def of(cls, study: Study, search: Search, base: Setting) -> "Reporting":
        """Return what measures the edits of a study at the baseline's layers."""

        def measuring(split: Any) -> Measuring:
            asked = first_problems(study.splits[split], search.probed)
            return Measuring(
                *(study.model, study.tokenizer, study.languages, asked, study.source.languages()),
                *(list(range(base.layers[0], base.layers[1] + 1)), study.declared["mode"], split, study.chat),
                study.ranks,
                site=WRITE if base.site == WRITE else "mlp_out",
            )

        return cls(measuring("dev"), measuring("test"), study.folder, search.controls, study.ranks)

    def on_test(self, chosen: Subspace, baseline: Subspace, name: str) -> dict[str, Any]:
        """Measure the choice, the baseline, the original and the controls on test. Return their figures as JSON.

        name: of the choice. What is finished is kept in measured.json, so a killed study does not do it again. All
        processes must call this; process 0 writes the file, and draws the random edits.

        Returns {"probed": what the probe was asked, by split; "measured": {"original", "baseline", "chosen", "haar:0",
        ...: figures}; "difference": of the choice from the baseline}.
        """
        edits: dict[str, Callable[[], Subspace | None]] = {
            ORIGINAL: lambda: None,
            BASELINE: lambda: baseline,
            CHOSEN: lambda: chosen,
        }
        for seed in range(self.controls):
            for kind in (HAAR, MATCHED):
                edits[f"{kind}:{seed}"] = lambda k=kind, s=seed: self._random(chosen, k, s)  # type: ignore[misc]
        found = self.test.all_of(edits, self.folder / MEASURED, name)
        return {
            "probed": {split: m.asked_of() for split, m in (("dev", self.dev), ("test", self.test))},
            "measured": self.ranks.by_first(lambda: {edit: self.test.figures(by) for edit, by in found.items()}),
            "difference": difference(found[CHOSEN], found[BASELINE]),
        }

    def _random(self, subspace: Subspace, kind: str, seed: int) -> Subspace:
        """Return a random edit of the same rank, layers and strengths."""
        return random_edits(self.test.text, subspace, kind, seed)
