"""The [search] of a declaration: what is varied, what counts, and how the choice is made.

    [search]
    trials = 40                          # settings to try, beside the baseline
    objectives = ["damage", "probe"]     # what is measured on dev; also "means", "accuracy", "fidelity"
    choose = "damage"                    # of the settings that keep the limits, the one that is best in this
    limits = {probe = "baseline"}        # a number or "baseline": as good at least (default: for all others)
    probed = 20                          # problems whose tokens the probe reads
    controls = 3                         # random edits of each kind beside the choice
    knots = 1                            # strengths along the layers, with straight lines between them

    [search.baseline]                    # what the choice is compared with; the default is what `fit` does
    method = "oblique"
    first_layer = 8
    last_layer = 21

    [search.space]                       # the rest is as in the baseline
    method = ["oblique", "leace"]        # a list of choices
    rank = {low = 1, high = 6}           # or a range
    shrinkage = {low = 1e-4, high = 0.5, log = true}
    strength = {low = 0.2, high = 1.5}

Names of the space: method, rank, site, pool ("last", "mean", "tokens" or "sequential"), shrinkage, offset (true or
false), first_layer, last_layer, strength. The objectives are:

    damage     mean KL(original || edited) on neutral text, nats per token, in the worst language
    probe      accuracy of a held-out linear probe for the language, over the tokens of dev prompts
    means      norm of the covariance with the language over those tokens, over the original's: 1 without an edit
    accuracy   share of the dev problems that are solved
    fidelity   share of all texts that are judged and in the language of the prompt

The first three shall be small, the others large. Probe and means are taken at the baseline's layers, whatever layers a
setting edits, and averaged over them. What all prompts begin with, such as a template, is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import ERASING, METHODS, POOLS, SITES, TOKENS
from kernel_surgery.models.architectures import default_layers
from kernel_surgery.studies.settings import SEQUENTIAL, Setting, impossible

if TYPE_CHECKING:
    from optuna.trial import Trial

DIRECTIONS = {
    **dict.fromkeys(("damage", "probe", "means"), "minimize"),
    **dict.fromkeys(("accuracy", "fidelity"), "maximize"),
}
ASKED = ("accuracy", "fidelity")  # the objectives that need answers
BASELINE = "baseline"
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "site": SITES,
    "pool": (*POOLS, TOKENS, SEQUENTIAL),
    "offset": (True, False),
}
WHOLE = ("rank", "first_layer", "last_layer")
NUMBERS = (*WHOLE, "shrinkage", "strength")
NAMES = (*CHOICES, *NUMBERS)


@dataclass(frozen=True)
class Search:
    """A checked [search]. space: {name: a list of choices, or a range}. baseline: as declared."""

    trials: int = 40
    objectives: tuple[str, ...] = ("damage", "probe")
    choose: str = "damage"
    limits: Mapping[str, float | str] | None = None
    probed: int = 20
    controls: int = 3
    knots: int = 1
    baseline: Mapping[str, Any] | None = None
    space: Mapping[str, Any] | None = None

    @property
    def allowed(self) -> dict[str, float | str]:
        """The limits; by default every objective but the chosen one at least as good as the baseline."""
        if self.limits is not None:
            return dict(self.limits)
        return dict.fromkeys((name for name in self.objectives if name != self.choose), BASELINE)

    def baseline_setting(self, n_layers: int) -> Setting:
        """Return the baseline for a model of so many layers."""
        middle = default_layers(n_layers)
        given = {"first_layer": middle[0], "last_layer": middle[-1]} | dict(self.baseline or {})
        return _setting(given, Setting(), self.knots)

    def reach(self, n_layers: int) -> range:
        """Return all layers from the first to the last that a setting may have."""
        ends = [*self.baseline_setting(n_layers).layers]
        for name in ("first_layer", "last_layer"):
            held = (self.space or {}).get(name, [])
            ends += [held["low"], held["high"]] if isinstance(held, dict) else held
        return range(min(ends), max(ends) + 1)

    def draw(self, trial: "Trial", n_layers: int, mode: str = "hook") -> Setting:
        """Return the setting of an Optuna trial.

        Only methods, pools and offsets are offered that can be together, and a shrinkage only to a method that has one.
        What depends on the data, such as a rank that they do not have, is refused when it is fitted.
        """
        base, drawn = self.baseline_setting(n_layers), dict[str, Any]()
        for name in ("site", "first_layer", "last_layer"):
            drawn |= self._suggest(trial, name)
        base = replace(_setting(drawn, base, self.knots), offset=False)
        pools = self._choices("pool") or [base.pool]

        def possible(method: str) -> list[str]:
            return [pool for pool in pools if not impossible(replace(base, method=method, pool=pool), mode)]

        # `check_space` has seen that there is one.
        methods = [method for method in self._choices("method") or [base.method] if possible(method)]
        # One name for each list of choices: Optuna wants the same choices under the same name.
        base = replace(base, method=_one_of(trial, f"method at {base.site}", methods))
        base = replace(base, pool=_one_of(trial, f"pool of {base.method} at {base.site}", possible(base.method)))
        base = _setting(self._suggest(trial, "rank"), base, self.knots)
        if base.method in ERASING:
            base = _setting(self._suggest(trial, "shrinkage"), base, self.knots)
        offsets = self._choices("offset") or [self.baseline_setting(n_layers).offset]
        offsets = [offset for offset in offsets if not impossible(replace(base, offset=offset), mode)]
        if offsets:
            base = replace(base, offset=_one_of(trial, f"offset of {base.method} at {base.site}", offsets))
        if "strength" in (self.space or {}):
            found = [self._suggest(trial, "strength", f"strength {i + 1}")["strength"] for i in range(self.knots)]
            base = replace(base, strengths=tuple(found))
        return base

    def _choices(self, name: str) -> list[Any]:
        return list((self.space or {}).get(name, []))

    def _suggest(self, trial: "Trial", name: str, label: str | None = None) -> dict[str, Any]:
        """Return {name: a value}, or nothing if the name is not in the space."""
        held, label = (self.space or {}).get(name), label or name
        if held is None:
            return {}
        if isinstance(held, list):
            return {name: trial.suggest_categorical(label, held)}
        low, high, log = held["low"], held["high"], held.get("log", False)
        if name in WHOLE:
            return {name: trial.suggest_int(label, low, high, log=log)}
        return {name: trial.suggest_float(label, low, high, log=log)}


def _one_of(trial: "Trial", name: str, choices: list[Any]) -> Any:
    """Return one of the choices; the only one without asking Optuna."""
    return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)


def _setting(given: Mapping[str, Any], base: Setting, knots: int) -> Setting:
    """Return `base` with the given values. Layers that are the wrong way round are exchanged."""
    first, last = given.get("first_layer", base.layers[0]), given.get("last_layer", base.layers[1])
    plain = ("method", "rank", "site", "pool", "offset")
    changes: dict[str, Any] = {name: given[name] for name in plain if name in given}
    changes |= {"shrinkage": float(given["shrinkage"])} if "shrinkage" in given else {}
    changes |= {"strengths": (float(given["strength"]),)} if "strength" in given else {}
    return replace(base, layers=(min(first, last), max(first, last)), **changes)


def read_search(held: Mapping[str, Any], where: str) -> Search:
    """Check a [search] and fill in the defaults. Raises UserError for names and values that cannot be used."""
    known = [field.name for field in fields(Search)]
    _known("search", held, known, where)
    given = dict(held)
    if not isinstance(given.get("objectives", []), list):
        raise UserError(f"{where}: search.objectives is {given['objectives']!r}, not a list.")
    if "objectives" in given:
        given["objectives"] = tuple(given["objectives"])
    if not isinstance(given.get("limits", {}), Mapping):
        raise UserError(f"{where}: search.limits is {given['limits']!r}, not a table such as {{probe = 0.9}}.")
    search = Search(**given)
    for name in ("trials", "probed", "controls", "knots"):
        least = 0 if name == "controls" else 1
        if not _whole(value := getattr(search, name)) or value < least:
            raise UserError(f"{where}: search.{name} is {value!r}, not a whole number of at least {least}.")
    for name in search.objectives:
        if not isinstance(name, str) or name not in DIRECTIONS:
            raise UserError(f"{where}: search.objectives has {name!r}; known: {', '.join(DIRECTIONS)}.")
    if len(set(search.objectives)) != len(search.objectives) or len(search.objectives) < 2:
        raise UserError(f"{where}: search.objectives is {list(search.objectives)!r}, not two or more different ones.")
    for name in (search.choose, *search.allowed):
        if name not in search.objectives:
            raise UserError(f"{where}: {name!r} is not in search.objectives, {', '.join(search.objectives)}.")
    for name, limit in search.allowed.items():
        if limit != BASELINE and not _number(limit):
            raise UserError(f'{where}: search.limits.{name} is {limit!r}, neither a number nor "{BASELINE}".')
    if search.choose in search.allowed:
        raise UserError(f"{where}: search.limits has {search.choose!r}, which is what search.choose makes best.")
    _known("search.baseline", search.baseline or {}, NAMES, where)
    _known("search.space", search.space or {}, NAMES, where)
    if not search.space:
        raise UserError(f"{where}: search.space is empty: name at least one of {', '.join(NAMES)}.")
    for name, value in (search.baseline or {}).items():
        _check_value(f"search.baseline.{name}", name, value, where)
    for name, values in search.space.items():
        _check_range(f"search.space.{name}", name, values, where)
    if why := impossible(_setting(search.baseline or {}, Setting(), search.knots)):
        raise UserError(f"{where}: search.baseline cannot be fitted: {why}.")
    return search


def check_space(search: Search, n_layers: int, mode: str = "hook", where: str = "the declaration") -> None:
    """Check a search against a model and a mode.

    Raises UserError for a layer that the model does not have, and for a baseline or a space that cannot be.
    """
    for part in ("baseline", "space"):
        for name in ("first_layer", "last_layer"):
            held = (getattr(search, part) or {}).get(name, 0)
            values = [held["low"], held["high"]] if isinstance(held, dict) else held
            for value in values if isinstance(values, list) else [values]:
                if not 0 <= value < n_layers:
                    raise UserError(
                        f"{where}: search.{part}.{name} has {value}; the model has layers 0 to {n_layers - 1}."
                    )
    if why := impossible(search.baseline_setting(n_layers), mode):
        raise UserError(f"{where}: search.baseline cannot be made in mode {mode}: {why}.")
    base, space = search.baseline_setting(n_layers), search.space or {}
    methods, pools = space.get("method", [base.method]), space.get("pool", [base.pool])
    for site in space.get("site", [base.site]):
        tried = [replace(base, site=site, method=m, pool=p, offset=False) for m in methods for p in pools]
        if all(impossible(setting, mode) for setting in tried):
            raise UserError(f"{where}: nothing of search.space can be made at {site}: {impossible(tried[0], mode)}.")


def _known(part: str, held: Any, names: Any, where: str) -> None:
    if not isinstance(held, Mapping):
        raise UserError(f"{where}: {part} is {held!r}, not a table of settings.")
    for name in held:
        if name not in names:
            choose = ", ".join(f"{part}.{known}" for known in sorted(names))
            raise UserError(f"{where}: unknown setting '{part}.{name}': choose from {choose}.")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_value(path: str, name: str, value: Any, where: str) -> None:
    """Check one value of a setting. Raises UserError."""
    if name in CHOICES:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in CHOICES[name]):
            known = ", ".join(str(choice).lower() if isinstance(choice, bool) else choice for choice in CHOICES[name])
            raise UserError(f"{where}: {path} has {value!r}; known: {known}.")
    elif name in WHOLE:
        if not _whole(value) or value < (name == "rank"):
            raise UserError(f"{where}: {path} has {value!r}, not a whole number{' of at least 1' * (name == 'rank')}.")
    elif not _number(value) or (name == "shrinkage" and not 0 <= value <= 1):
        raise UserError(f"{where}: {path} has {value!r}, not a number{' from 0 to 1' * (name == 'shrinkage')}.")


def _check_range(path: str, name: str, values: Any, where: str) -> None:
    """Check the choices or the range of one name of the space. Raises UserError."""
    if isinstance(values, list) and values:
        for value in values:
            _check_value(path, name, value, where)
        return
    form = "a list of choices" + " or a range such as {low = 1, high = 6}" * (name in NUMBERS)
    ranged = isinstance(values, dict) and {"low", "high"} <= values.keys() <= {"low", "high", "log"}
    if not ranged or name not in NUMBERS:
        raise UserError(f"{where}: {path} is {values!r}, not {form}.")
    for end in ("low", "high"):
        _check_value(path, name, values[end], where)
    if values["low"] > values["high"] or (values.get("log") and values["low"] <= 0):
        raise UserError(f"{where}: {path} is {values!r}: low must be at most high, and above 0 if log is true.")
