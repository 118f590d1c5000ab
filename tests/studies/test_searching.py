"""Trials are proposed from the seed and from what is stored alone; the choice follows the declared rule."""

import builtins
import json
import math

import pytest

from kernel_surgery.common.errors import KernelSurgeryError, SubspaceError, UserError
from kernel_surgery.studies import searching
from kernel_surgery.studies.searching import Row, choose, front, rule, search_settings
from kernel_surgery.studies.settings import Setting
from kernel_surgery.studies.space import read_search

SPACE = {
    "method": ["oblique", "centroids"],
    "rank": {"low": 1, "high": 6},
    "shrinkage": {"low": 1e-4, "high": 0.5, "log": True},
    "strength": {"low": 0.2, "high": 1.5},
}


def searched(**more):
    return read_search({"trials": 16, "space": SPACE} | more, "x")


def measured(setting):
    """Figures with a known front: damage grows with the rank, the probe falls with it."""
    rank = setting.rank or 6
    if setting.method == "centroids" and rank == 4:
        raise SubspaceError("no such rank")
    return {"damage": rank**2 * setting.strengths[0] + setting.shrinkage, "probe": 1 / rank}


class Killed(BaseException):
    pass


def test_a_killed_search_goes_on_as_if_it_had_not_been_killed(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = search_settings(searched(), 8, "hook", tmp_path / "whole", 0, measured)
    assert [row.number for row in whole] == list(range(-1, 16))
    assert len({row.name for row in whole}) > 10 and any(row.refused for row in whole)
    # Killed inside the measurement, and between the storing of a row and Optuna's being told of it.
    calls, real, said = [], searching._tell, []

    def dying(setting):
        calls.append(setting)
        if len(calls) in (1, 4, 13):
            raise Killed
        return measured(setting)

    def deaf(study, number, row, search):
        if number in (2, 11) and number not in told:
            told.append(number)
            raise Killed
        real(study, number, row, search)

    told: list[int] = []
    monkeypatch.setattr(searching, "_tell", deaf)
    kills, found = 0, []
    while not found:
        try:
            found = search_settings(searched(), 8, "hook", tmp_path / "killed", 0, dying, said.append)
        except Killed:
            kills += 1
    print(f"{kills} kills")
    assert kills == 5 and len(said) == 4 and "of 16 settings are measured; going on from there" in said[-1]
    assert [(r.setting, r.figures, r.refused) for r in found] == [(r.setting, r.figures, r.refused) for r in whole]
    # Nothing finished was measured twice: every call but the killed ones is a row, or the same setting as one.
    assert len(calls) - 3 == len({json.dumps(row.setting) for row in found})
    # All is done: nothing is measured again.
    assert search_settings(searched(), 8, "hook", tmp_path / "killed", 0, lambda setting: 1 / 0) == found


def test_equal_settings_are_measured_once(tmp_path):
    calls = []
    search = read_search({"trials": 8, "space": {"rank": [1, 2]}}, "x")
    rows = search_settings(search, 8, "hook", tmp_path, 0, lambda setting: calls.append(setting) or measured(setting))
    assert len(rows) == 9 and sorted(s.rank or 0 for s in calls) == [0, 1, 2]
    assert all(row.figures == measured(Setting.of(row.setting)) for row in rows)


def test_another_seed_is_another_search(tmp_path):
    names = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        names.append(
            [r.name for r in search_settings(searched(trials=4), 8, "hook", tmp_path / str(seed), seed, measured)]
        )
    assert names[0][0] == names[1][0] and not set(names[0][1:]) & set(names[1][1:])


@pytest.mark.parametrize("figure", [math.inf, math.nan])
def test_a_figure_that_is_not_finite_refuses_the_setting(tmp_path, figure):
    def measure(setting):
        return {"damage": 1.0, "probe": 0.5 if setting == searched().baseline_setting(8) else figure}

    rows = search_settings(searched(trials=2), 8, "hook", tmp_path, 0, measure)
    assert [row.refused for row in rows] == [None, *["probe is not a finite number: the edit overflows this dtype"] * 2]
    assert choose(rows, searched()) == rows[0] == front(rows, ["damage", "probe"])[0]
    assert search_settings(searched(trials=2), 8, "hook", tmp_path, 0, measure) == rows


def test_a_baseline_that_cannot_be_made_is_an_error(tmp_path):
    def measure(setting):
        raise SubspaceError("no such rank")

    with pytest.raises(KernelSurgeryError, match="no such rank"):
        search_settings(searched(), 8, "hook", tmp_path, 0, measure)
    with pytest.raises(KernelSurgeryError, match="probe is not a finite number"):
        search_settings(searched(), 8, "hook", tmp_path, 0, lambda setting: {"damage": 1.0, "probe": math.nan})


def rows(*figures):
    return [
        Row(i - 1, {}, f"row {i - 1}", {"damage": damage, "probe": probe, "accuracy": accuracy})
        for i, (damage, probe, accuracy) in enumerate(figures)
    ]


def test_the_front_is_what_no_other_row_beats():
    made = rows((2, 0.5, 1), (1, 0.9, 1), (3, 0.4, 1), (3, 0.5, 1), (2, 0.5, 1), (1, 0.9, 0.5))
    assert [row.number for row in front(made, ["damage", "probe"])] == [-1, 0, 1]
    # A third objective, which shall be large, keeps more.
    made = rows((2, 0.5, 0.1), (2, 0.5, 0.3), (9, 0.9, 0.9))
    assert [row.number for row in front(made, ["damage", "probe", "accuracy"])] == [0, 1]
    refused = Row(5, {}, "refused", {}, "why")
    assert front([*made, refused], ["damage", "probe"]) == made[:1]


@pytest.mark.parametrize(
    "more, number",
    [
        ({}, 1),
        ({"limits": {"probe": 0.45}}, 2),
        ({"limits": {"probe": 0.95}}, 0),
        ({"limits": {}}, 0),
        ({"choose": "probe", "limits": {"damage": 2.5}}, 1),
        ({"choose": "probe", "limits": {"damage": "baseline"}}, 1),
        ({"objectives": ["damage", "probe", "accuracy"], "limits": {"accuracy": 0.8}}, 2),
    ],
)
def test_the_choice_is_the_best_of_those_that_keep_the_limits(more, number):
    made = rows((3, 0.5, 0.5), (1, 0.9, 0.5), (2, 0.5, 0.5), (4, 0.4, 0.9))
    assert choose(made, searched(**more)).number == number


def test_limits_that_nothing_keeps_are_an_error_with_the_nearest():
    made = rows((3, 0.5, 1), (1, 0.9, 1))
    with pytest.raises(UserError, match=r"none of the 2 settings keeps the limits \(probe 0.1\); the nearest has dam"):
        choose(made, searched(limits={"probe": 0.1}))


def test_the_rule_is_said_in_words():
    assert rule(searched()) == (
        "of the Pareto front (damage, probe), the least damage with probe at most that of the baseline, on dev"
    )
    found = rule(searched(objectives=["damage", "accuracy"], choose="accuracy", limits={"damage": 0.1}))
    assert found == "of the Pareto front (damage, accuracy), the largest accuracy with damage at most 0.1, on dev"


def test_without_optuna_the_error_says_how_to_get_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **more):
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'needs Optuna, .* not installed: pip install optuna'):
        search_settings(searched(), 8, "hook", tmp_path, 0, measured)
    assert not list(tmp_path.iterdir())


def test_rows_are_json():
    row = Row(3, {"rank": 1}, "a", {"damage": 0.5}, None)
    assert json.loads(json.dumps(row.as_json())) == {"number": 3, "name": "a", "setting": {"rank": 1}, "damage": 0.5}
