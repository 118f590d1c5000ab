"""Random edits beside a fitted one: of the same rank, at the same layers and site.

Random edits know nothing of the language. What they do too comes from taking k dimensions away. There are four kinds:

    haar       uniform among all k-dimensional subspaces, at the strengths of the fitted edit
    matched    by covariance: directions in which the activations vary, in the form of the fitted edit
    energy     uniform, at strengths that take as much of the activations' energy as the fitted edit does
    pca        uniform among the first 100 principal components of the activations

The first two are those of `damage.yardsticks`, the last two those of `evaluation.controls`. The activations are those
of the text that the damage is measured on.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import RANDOM_EDITS
from kernel_surgery.damage.measure import neutral_moments, random_edits
from kernel_surgery.damage.neutral import NeutralText
from kernel_surgery.damage.words import HAAR, MATCHED
from kernel_surgery.evaluation.controls import Control, draw
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.moments import Moments

KINDS = {HAAR: "uniform", MATCHED: "by covariance", "energy": "of equal energy", "pca": "of the components"}
SCALED = "energy"  # the kind that takes no direction away: a linear probe still reads what is scaled
SEED = 1  # with 0, the bases of one kind would be those of another


def parse_kinds(text: str) -> dict[str, int]:
    """Parse an option such as "energy:5,matched:5" into {kind: count}. Raises UserError for any other form."""
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, _, count = part.strip().partition(":")
        if kind not in KINDS or kind in found or not count.isdecimal() or int(count) < 1:
            raise UserError(
                f"--controls takes kinds with numbers, such as {RANDOM_EDITS}; the kinds are {', '.join(KINDS)}, each "
                f"once. Got {text!r}."
            )
        found[kind] = int(count)
    return found


def random_subspaces(
    text: NeutralText, subspace: Subspace, kinds: Mapping[str, int]
) -> dict[str, Callable[[], Subspace]]:
    """Return {name, such as "haar:0": a function that returns that random edit}.

    A longer list begins with the shorter one. The functions read the model, which must be unedited when they are
    called. They raise what `evaluation.controls.draw` raises.
    """

    @cache
    def moments() -> dict[int, Moments]:
        return neutral_moments(text, subspace)

    @cache
    def controls(kind: str) -> list[Control]:
        return draw(kind, kinds[kind], subspace, 1.0, moments(), SEED)

    def make(kind: str, number: int) -> Subspace:
        if kind in (HAAR, MATCHED):
            return random_edits(text, subspace, kind, number)
        control = controls(kind)[number]
        edits = {layer: Projection(basis) for layer, basis in control.bases.items()}
        return replace(subspace.with_edits(edits), strengths=control.strengths)

    names = {f"{kind}:{number}": (kind, number) for kind, count in kinds.items() for number in range(count)}
    return {name: lambda which=which: make(*which) for name, which in names.items()}  # type: ignore[misc]
