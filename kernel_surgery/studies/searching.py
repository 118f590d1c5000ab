"""Try settings with Optuna, which proposes them, and choose one by a declared rule.

Optuna's own database, search.db, holds every trial. A search that was killed goes on from there, and proposes the same
settings as if it had not been killed: what is proposed depends on the seed and on the trials before it alone.

Of several processes (`common.ranks`) the first asks Optuna and tells it; all measure each setting together, so what is
proposed is what one process is proposed.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.common.ranks import Ranks
from kernel_surgery.studies.settings import Setting
from kernel_surgery.studies.space import BASELINE, DIRECTIONS, Search

STORAGE = "search.db"
STARTUP = 12  # settings that are drawn at random before Optuna's model of the objectives begins
Figures = dict[str, Any]
# Returns the figures of a setting on dev.
Measure = Callable[[Setting], Figures]


@dataclass(frozen=True)
class Row:
    """One setting that was tried. number: the trial's; -1 for the baseline. figures: of `Measured.as_json`, and those
    of the objectives that need answers. refused: why it could not be made, or None.
    """

    number: int
    setting: dict[str, Any]
    name: str
    figures: Figures
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"number": self.number, "name": self.name, "setting": self.setting, **self.figures} | (
            {"refused": self.refused} if self.refused else {}
        )


def require_optuna() -> None:
    """Raise UserError, with the command that installs it, if Optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        fix = "pip install optuna"
        raise UserError(f"a [search] needs Optuna, which is not installed: {fix}.") from error


def search_settings(
    search: Search,
    n_layers: int,
    mode: str,
    folder: Path,
    seed: int,
    measure: Measure,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Measure the baseline and `search.trials` settings. Return their rows, the baseline's first.

    mode: in which edits are made. measure: returns the figures of a setting on dev, or raises KernelSurgeryError for
    one that cannot be made; that trial is kept as refused, and so is one with a figure that is not finite. Equal
    settings are measured once. say: called with a line if a search goes on.

    Raises UserError if Optuna is missing, and what `measure` raises for the baseline. A UserError of `measure` is of no
    setting, and ends the search.
    """
    require_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [DIRECTIONS[name] for name in search.objectives]
    storage = f"sqlite:///{(folder / STORAGE).absolute()}"
    study = optuna.create_study(study_name="search", storage=storage, directions=directions, load_if_exists=True)
    study.set_user_attr("optuna", optuna.__version__)
    base = search.baseline_setting(n_layers)
    if BASELINE not in study.user_attrs:
        study.set_user_attr(BASELINE, _stored(_finite(base, measure)))
    rows = [Row(-1, base.as_json(), base.name, _loaded(study.user_attrs[BASELINE]))]
    rows += _finished(study)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        _tell(study, trial.number, next((r for r in rows if r.number == trial.number), None), search)  # a kill left it
    if len(rows) > 1:
        say(f"{folder / STORAGE}: {len(rows) - 1} of {search.trials} settings are measured; going on from there")
    known = {_key(row.setting): row for row in rows}
    with progress_bar(search.trials, "search", unit="setting", initial=min(len(rows) - 1, search.trials)) as bar:
        while len(rows) - 1 < search.trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                options: dict[str, Any] = {"multivariate": True, "group": True, "n_startup_trials": STARTUP}
                # A new sampler for every trial: its state is then a function of what is stored.
                study.sampler = optuna.samplers.TPESampler(seed=seed + 1000 * (len(rows) - 1), **options)
                trial = study.ask()
                setting = search.draw(trial, n_layers, mode)
            row = _measured(trial.number, setting, known, measure)
            trial.set_user_attr("row", _stored(row.as_json()))
            _tell(study, trial.number, row, search)
            rows.append(row)
            known.setdefault(_key(row.setting), row)
            bar.update()
    return rows


def search_together(ranks: Ranks, measure: Measure, search: Callable[[Measure], list[Row]]) -> list[Row]:
    """Return the rows of `search`, which process 0 runs; all processes measure each of its settings together.

    measure: called in all processes with the same setting; what it raises for a setting that cannot be made, it must
    raise in all. search: called in process 0 with a function that measures a setting.

    Raises what `search` and `measure` raise, and what `Ranks.gathered` raises.
    """
    if ranks.first:

        def lead(setting: Setting) -> Figures:
            ranks.agreed((setting, []))
            return measure(setting)

        return ranks.agreed((None, search(lead)))[1]
    while (told := ranks.agreed((None, list[Row]())))[0] is not None:
        try:
            measure(told[0])
        except UserError:
            raise
        except KernelSurgeryError:
            pass  # process 0 has refused the setting, and goes on
    return told[1]


def _tell(study: Any, number: int, row: Row | None, search: Search) -> None:
    """Give Optuna a trial's figures. One without figures was refused, or a kill has cut it off: it has failed."""
    import optuna

    if row is None or row.refused:
        study.tell(number, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(number, [row.figures[name] for name in search.objectives])


def _measured(number: int, setting: Setting, known: Mapping[str, Row], measure: Measure) -> Row:
    """Return the row of a setting, whose figures may be known."""
    if same := known.get(_key(setting.as_json())):
        return Row(number, setting.as_json(), setting.name, same.figures, same.refused)
    try:
        return Row(number, setting.as_json(), setting.name, _finite(setting, measure))
    except UserError:
        raise  # not of this setting: of the folder, say
    except KernelSurgeryError as error:
        return Row(number, setting.as_json(), setting.name, {}, str(error))


def _finite(setting: Setting, measure: Measure) -> Figures:
    """Return the figures of a setting. Raises KernelSurgeryError if one is not finite, and what `measure` raises."""
    figures = measure(setting)
    if broken := [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise KernelSurgeryError(f"{broken[0]} is not a finite number: the edit overflows this dtype")
    return figures


def _key(setting: Mapping[str, Any]) -> str:
    """Return what equal settings share. Names round."""
    return json.dumps(setting, sort_keys=True)


def _finished(study: Any) -> list[Row]:
    """Return the rows of the trials that are finished, in order."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if "row" in trial.user_attrs:
            held = _loaded(trial.user_attrs["row"])
            about = {name: held.pop(name, None) for name in ("number", "setting", "name", "refused")}
            rows.append(Row(about["number"], about["setting"], about["name"], held, about["refused"]))
    return rows


def _stored(value: object) -> str:
    # As text, in the order in which it was written.
    return json.dumps(value)


def _loaded(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


# --- the choice ---


def worse(one: Figures, other: Figures, name: str) -> float:
    """Return how much worse `one` is than `other` in an objective; negative if it is better."""
    sign = 1 if DIRECTIONS[name] == "minimize" else -1
    return sign * (one[name] - other[name])


def front(rows: Sequence[Row], objectives: Sequence[str]) -> list[Row]:
    """Return the Pareto front: the rows that no other is at least as good as in everything and better in something.

    Of equal rows the first is taken.
    """
    usable = [row for row in rows if not row.refused]
    found = []
    for i, row in enumerate(usable):
        differences = [
            (j, [worse(other.figures, row.figures, name) for name in objectives]) for j, other in enumerate(usable)
        ]
        beaten = any(max(by) <= 0 and (min(by) < 0 or j < i) for j, by in differences if j != i)
        if not beaten:
            found.append(row)
    return found


def choose(rows: Sequence[Row], search: Search) -> Row:
    """Return the row of the front that is best in `search.choose` among those that keep the limits.

    rows: the baseline's first. Ties go to the one that was tried first. Raises UserError if none keeps the limits, with
    the nearest.
    """
    base = rows[0].figures
    limits = {name: base[name] if at == BASELINE else float(at) for name, at in search.allowed.items()}
    best = front(rows, search.objectives)
    kept = [row for row in best if all(worse(row.figures, limits, name) <= 0 for name in limits)]
    if not kept:
        nearest = min(best, key=lambda row: max(worse(row.figures, limits, name) for name in limits))
        asked = ", ".join(f"{name} {limit:.4g}" for name, limit in limits.items())
        shown = ", ".join(f"{name} {nearest.figures[name]:.4g}" for name in search.objectives)
        raise UserError(
            f"none of the {len(rows)} settings keeps the limits ({asked}); the nearest has {shown}: {nearest.name}.\n"
            "Nothing was chosen, and no test problem was asked. Loosen search.limits, or try more settings: give "
            "another --out."
        )
    return min(kept, key=lambda row: (worse(row.figures, base, search.choose), row.number))


def rule(search: Search) -> str:
    """Return the rule in words."""
    words = {"minimize": ("least", "at most"), "maximize": ("largest", "at least")}
    limits = [
        f"{name} {words[DIRECTIONS[name]][1]} {'that of the baseline' if at == BASELINE else format(at, 'g')}"
        for name, at in search.allowed.items()
    ]
    kept = f" with {' and '.join(limits)}" if limits else ""
    most = words[DIRECTIONS[search.choose]][0]
    return f"of the Pareto front ({', '.join(search.objectives)}), the {most} {search.choose}{kept}, on dev"
