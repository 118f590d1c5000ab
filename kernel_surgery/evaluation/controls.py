"""Null controls: random subspaces of the same rank, edited at the same layers and site.

If random subspaces have an effect too, it comes from removing k dimensions, not from language. There are three kinds:

    haar     U is uniform among all k-dimensional subspaces; the strength of each layer is that of the real edit
    energy   as haar, with the strength scaled so that the edit removes as much energy from the activations as the real
             one does
    pca      U is uniform among the k-dimensional subspaces of the first 100 principal components of the activations

The activations are the MLP blocks' outputs at every token of the dev split's prompts (`moments`).
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.names import BATCH_TOKENS
from kernel_surgery.common.progress import progress
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.yardsticks import haar_basis
from kernel_surgery.edit.modes import applier_of
from kernel_surgery.edit.plan import Edit
from kernel_surgery.evaluation.answering import Asking, Context, EditBlock, answer_cells, missing_cells
from kernel_surgery.evaluation.judging import Cells, Sample, score_again
from kernel_surgery.evaluation.shares import answer_together, take_up_together
from kernel_surgery.evaluation.stats import holm
from kernel_surgery.evaluation.summary import summarize
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.problems.generator import Problem, problems
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import encode
from kernel_surgery.subspace.moments import Moments
from kernel_surgery.subspace.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("haar", "energy", "pca")
COMPONENTS = 100
PROBLEMS = 20  # per category, at most


@dataclass(frozen=True)
class Control:
    """One random subspace.

    name: such as "haar:03". bases: {layer: U [d_model, k]}. strengths: {layer: a}. site: where it is made.
    """

    name: str
    bases: dict[int, torch.Tensor]
    strengths: dict[int, float]
    site: str = "mlp_out"


def parse_controls(text: str | None) -> tuple[str, int] | None:
    """Parse an option such as `haar:20` into ("haar", 20). Raises UserError for any other form."""
    if text is None:
        return None
    kind, _, count = text.partition(":")
    if kind not in KINDS or not count.isdigit() or int(count) < 1:
        raise UserError(f"--controls takes {', '.join(f'{k}:N' for k in KINDS)} with N at least 1, got {text!r}.")
    return kind, int(count)


def moments(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    layers: Iterable[int],
    batch_tokens: int = BATCH_TOKENS,
    chat: Chat = OFF,
    site: str = "mlp_out",
) -> dict[int, Moments]:
    """Return {layer: Moments} over every token of the prompts, without padding.

    chat: how the prompts are put to the model. site: where the activations are read.

    Numerics: sums in float64.
    """
    found: dict[int, Moments] = {}

    def take(layer: int, states: torch.Tensor, mask: torch.Tensor) -> None:
        found.setdefault(layer, Moments.empty(1, states.shape[-1], states.device)).add(states[mask.bool()], 0)

    encoded, batches = encode(tokenizer, prompts, batch_tokens, [chat])
    with reading(model, tokenizer, list(layers), site, take) as read:
        for batch in progress(batches, total=len(batches), desc="activations"):
            read([encoded[i] for i in batch])
    return found


def first_of_each_category(asked: Sequence[Problem], count: int) -> list[Problem]:
    """Return the first `count` problems of every category, in their order."""
    taken: Counter[str] = Counter()
    chosen = []
    for problem in asked:
        taken[problem.category] += 1
        if taken[problem.category] <= count:
            chosen.append(problem)
    return chosen


def names_of(kind: str, count: int) -> list[str]:
    """Return the names of the first `count` controls of a kind."""
    return [f"{kind}:{number:02d}" for number in range(count)]


def draw(
    kind: str, count: int, subspace: Subspace, strength: float, found: dict[int, Moments] | None, seed: int = 0
) -> list[Control]:
    """Draw `count` controls of a kind.

    found: the moments of the activations, which "energy" and "pca" need.

    The result depends only on the kind, the seed and the shapes; for "energy" and "pca" also on the activations. A
    shorter list is the beginning of a longer one. Raises KernelSurgeryError if the activations have fewer principal
    components than the subspace has dimensions.
    """
    controls, known = [], found or {}
    for number, name in enumerate(names_of(kind, count)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + 101 * number + KINDS.index(kind))
        bases, strengths = {}, {}
        for layer, edit in subspace.projections.items():
            d, k = edit.basis.shape
            strengths[layer] = subspace.strength_at(layer, strength)
            if kind == "pca":
                inside = known[layer].components(COMPONENTS).cpu()
                if inside.shape[1] < k:
                    raise KernelSurgeryError(
                        f"layer {layer}: the activations span {inside.shape[1]} components, the subspace has rank {k}. "
                        "Use --controls haar:N."
                    )
                u = inside @ haar_basis(inside.shape[1], k, generator)
            else:
                u = haar_basis(d, k, generator)
            if kind == "energy":
                strengths[layer] *= (known[layer].energy(edit) / known[layer].energy(Projection(u))) ** 0.5
            bases[layer] = u.float().contiguous()
        controls.append(Control(name, bases, strengths, subspace.edited_site))
    return controls


@contextmanager
def controlled(
    applier: Callable[..., AbstractContextManager[Edit]], model: nn.Module, control: Control
) -> Iterator[list[Edit]]:
    """Apply a control's edit while the block runs.

    It makes one edit per layer, because each layer may have its own strength. Raises RuntimeError at the end of the
    block if a layer did not run.
    """
    with ExitStack() as stack:
        edits = [
            # It belongs to no model, so there is no fingerprint to check.
            stack.enter_context(
                applier(model, Subspace({layer: basis}, site=control.site), control.strengths[layer], force=True)
            )
            for layer, basis in control.bases.items()
        ]
        yield edits
        if idle := [layer for edit in edits for layer, calls in edit.calls.items() if not calls]:
            raise RuntimeError(f"{control.name} never ran at layers {idle}: these texts are not of the edited model")


# The measures that are tested, with correction; and all measures that are recorded.
TESTED = ("accuracy", "fat_tokens", "language_fidelity")
MEASURES = ("accuracy", "fat_tokens", "language_fidelity", "mean_tokens", "repetition")
MEASURE_WORDS = {"accuracy": "accuracy", "fat_tokens": "FAT", "language_fidelity": "language fidelity"}


def compare(real: dict[str, dict], rows: list[dict]) -> dict[str, dict]:
    """Return {language: {measure: its `percentile`}} of the real subspace among the controls.

    real: {language: figures}. rows: one per control and language, with "name", "language" and the figures. A measure
    that has no value (because no text could be judged) is left out.
    """
    percentiles: dict[str, dict] = {}
    for language, figures in real.items():
        control_rows = [row for row in rows if row["language"] == language]
        for measure in MEASURES:
            values = [row[measure] for row in control_rows]
            if figures[measure] is not None and values and None not in values:
                percentiles.setdefault(language, {})[measure] = percentile(figures[measure], values)
    tested = [percentiles[lang][measure] for lang in percentiles for measure in TESTED if measure in percentiles[lang]]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row |= {"holm_p": p, "comparisons": len(tested)}
    return percentiles


def verdict(found: dict[str, Any], alpha: float = 0.05) -> str:
    """Return the words that a percentile allows, with Holm's correction for everything that is compared.

    "Unlike" needs the corrected p. A value may lie beyond all controls when there are too few controls for that. Then
    the words say so, and how many controls it takes.
    """
    n, compared = found["n"], found["comparisons"]
    if found["holm_p"] < alpha:
        return f"different from random subspaces (corrected p {found['holm_p']:.3f})"
    if found["as_far"] == n:
        return f"no farther out than any of {n}" if found["spread"] else f"the same as all {n}"
    if found["as_far"]:
        return f"indistinguishable from random subspaces ({found['as_far']} of {n} are as far out)"
    needed = math.floor(compared / alpha)
    return f"farther out than all {n}, which are too few to show a difference ({needed} needed)"


def table(controls: dict[str, Any]) -> str:
    """Return the text that a run prints about its controls: the real figure, the controls' range, and the words."""
    lines = [
        f"Controls: {controls['count']} random subspaces ({controls['kind']}) with the same rank, layers and site, "
        f"{controls['problems']} problems per language, mode {controls['mode']}:"
    ]
    for language, measures in controls["percentiles"].items():
        original = controls["original"][language]
        for measure in TESTED:
            if measure not in measures:
                continue
            others = [row[measure] for row in controls["rows"] if row["language"] == language]
            real = controls["real"][language][measure]
            lines.append(
                f"  {language} {MEASURE_WORDS[measure]:<18} fitted {real:>8.3f}, original {original[measure]:>8.3f}, "
                f"random {min(others):.3f} to {max(others):.3f}: {verdict(measures[measure])}"
            )
    return "\n".join(lines)


def in_model(context: Context, mode: str, subspace: Subspace) -> dict[str, Any]:
    """Return the last arguments of `run_controls` for a loaded model: how it is edited, and how it is read.

    mode: how the edit is made; "all" means fused.
    """
    applier = applier_of("fused" if mode == "all" else mode)
    return {
        "block_of": lambda control: partial(controlled, applier, context.model, control),
        "activations_of": lambda prompts: moments(
            *(context.model, context.tokenizer, prompts, subspace.layers),
            chat=context.chat,
            site=subspace.edited_site,
        ),
    }


def run_controls(
    asking: Asking,
    cells: Cells,
    folder: Path,
    subspace: Subspace,
    asked_for: str,
    mode: str,
    strength: float,
    seed: int,
    pace: float | None = None,
    say: Callable[[str], object] = print,
    ranks: Ranks = ALONE,
    *,
    block_of: Callable[[Control], EditBlock],
    activations_of: Callable[[list[str]], dict[int, Moments]],
) -> dict[str, Any]:
    """Ask random subspaces the first problems of the test set. Return the controls' entry in results.json.

    cells: the texts of the original and of the real edit.
    asked_for: such as "haar:20".
    mode: how the edit is made; "all" means fused.
    pace: seconds per text in this run, or None if it made no text.
    say: called with a line of text that says what is about to be asked, and how long it may take.
    ranks: the processes that share the answering; all call this.
    block_of: returns the block that makes a control's edit (`in_model`). activations_of: returns the moments of the
    activations on prompts, for the kinds that need them.

    Every finished cell is stored in controls.jsonl, so an interrupted run continues from there. Raises what `draw` and
    `evaluation.answering.answer_cells` raise.
    """
    parsed = parse_controls(asked_for)
    assert parsed is not None  # it is None for None alone
    kind, count = parsed
    languages, mode = asking.languages, "fused" if mode == "all" else mode
    per_category = min(PROBLEMS, sum(p.category == asking.problems[0].category for p in asking.problems))
    problem_list = first_of_each_category(asking.problems, per_category)
    asking, path = asking.about(problem_list), folder / "controls.jsonl"
    rescore = score_again(asking.tokenizer, asking.chat)
    done = take_up_together(ranks, path, problem_list, rescore)
    # The file may also hold controls of another kind.
    texts = len(missing_cells(asking, names_of(kind, count), done)) * len(problem_list)
    estimate = "" if pace is None else f", about {max(1, round(texts * pace / 60))} min at the pace of this run"
    say(
        f"controls: {count} {kind} x {len(languages)} languages x {len(problem_list)} problems, {texts} texts to "
        f"generate{estimate}"
    )
    activations = None
    if kind != "haar":
        prompts = [p.prompts[lang] for p in problems("dev", per_category, seed=seed) for lang in languages]
        activations = activations_of(prompts)
    # Those of process 0: another machine's rounding would draw others.
    control_list = ranks.agreed(draw(kind, count, subspace, strength, activations, seed))
    blocks = {control.name: block_of(control) for control in control_list}

    def answer(asking: Asking, done: Cells, samples: Path) -> Cells:
        return answer_cells(asking, blocks, done, samples)

    texts_of = answer_together(ranks, asking, done, path, answer, rescore)
    header = {"kind": kind, "count": count, "mode": mode, "problems": len(problem_list), "seed": seed}
    header["strengths"] = {control.name: control.strengths for control in control_list}
    ids = {problem.id for problem in problem_list}
    return header | compared(texts_of, cells, kind, count, mode, languages, ids, asking.budget)


def compared(
    done: Cells,
    cells: Cells,
    kind: str,
    count: int,
    mode: str,
    languages: Sequence[str],
    ids: set[str],
    budget: int,
) -> dict[str, Any]:
    """Compare the controls' texts (`done`) with the run's own (`cells`), on the problems `ids`.

    Returns {"rows", "real", "original", "percentiles"}. Raises KeyError for a control without texts.
    """

    def figures(cell: list[Sample]) -> dict[str, Any]:
        summary = summarize([s for s in cell if s["id"] in ids], budget)
        return {key: summary[key] for key in MEASURES}

    names = names_of(kind, count)
    rows = [{"name": name, "language": lang} | figures(done[name, lang]) for name in names for lang in languages]
    real, original = ({lang: figures(cells[m, lang]) for lang in languages} for m in (mode, "original"))
    return {"rows": rows, "real": real, "original": original, "percentiles": compare(real, rows)}


def percentile(real: float, controls: Sequence[float]) -> dict[str, float | int]:
    """Return where a figure of the real subspace lies among the controls'.

    "percentile": share of controls below it, with ties counted half.
    "as_far": number of controls at least as far from the median of all, it included, as it is. "n": number of controls.
    "p": (1 + as_far) / (1 + n), the two-sided Monte Carlo p-value.
    "spread": largest distance of a control from the median.
    """
    n = len(controls)
    middle = statistics.median([*controls, real])  # else the real figure would be farther out than its rank is
    below = sum(c < real for c in controls) + sum(c == real for c in controls) / 2
    as_far = sum(abs(c - middle) >= abs(real - middle) - 1e-12 for c in controls)
    spread = max(abs(c - middle) for c in controls)
    return {"percentile": below / n, "as_far": as_far, "n": n, "p": (1 + as_far) / (1 + n), "spread": spread}
