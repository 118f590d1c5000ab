"""What a [search] may say, and the settings that are drawn from it."""

from dataclasses import replace

import optuna
import pytest

from kernel_surgery.common.errors import UserError
from kernel_surgery.studies.declaring import read_grid
from kernel_surgery.studies.settings import Setting, impossible
from kernel_surgery.studies.space import check_space, read_search

WIDE = {
    "method": ["oblique", "leace", "deviations", "centroids"],
    "rank": {"low": 1, "high": 6},
    "site": ["mlp_out", "resid_post"],
    "pool": ["last", "tokens", "sequential"],
    "shrinkage": {"low": 1e-4, "high": 0.5, "log": True},
    "offset": [True, False],
    "first_layer": {"low": 0, "high": 7},
    "last_layer": {"low": 0, "high": 7},
    "strength": {"low": 0.5, "high": 1.5},
}


def test_the_defaults_are_those_of_fit_and_of_the_middle_half():
    search = read_search({"space": {"rank": [1, 3]}}, "x")
    assert search.baseline_setting(8) == Setting(layers=(2, 5)) and Setting().method == "oblique"
    assert search.allowed == {"probe": "baseline"} and list(search.reach(8)) == [2, 3, 4, 5]
    assert search.baseline_setting(8).name == "oblique, layers 2-5, tokens, shrinkage 0.01, strength 1"


def test_every_setting_that_is_drawn_can_be_fitted_and_lies_in_the_space():
    search = read_search({"space": WIDE, "knots": 3, "baseline": {"first_layer": 1, "last_layer": 4}}, "x")
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [search.draw(study.ask(), 8) for _ in range(200)]
    assert not any(map(impossible, drawn)) and len({s.name for s in drawn}) > 150
    assert {(s.method, s.pool) for s in drawn} >= {
        ("deviations", "last"),
        ("leace", "sequential"),
        ("oblique", "tokens"),
    }
    assert all(0 <= s.layers[0] <= s.layers[1] <= 7 and len(s.strengths) == 3 for s in drawn)
    assert list(search.reach(8)) == list(range(8))
    assert all(1 <= s.rank <= 6 and min(s.strengths) >= 0.5 and 1e-4 <= s.shrinkage <= 0.5 for s in drawn)
    assert not any(s.offset for s in drawn if s.method == "leace" or s.site != "mlp_out")
    assert any(s.offset for s in drawn) and all(s == Setting.of(s.as_json()) for s in drawn)


@pytest.mark.parametrize(
    "strengths, expected",
    [
        ((0.7,), {2: 0.7, 3: 0.7, 4: 0.7, 5: 0.7}),
        ((1.0, 0.4), {2: 1.0, 3: 0.8, 4: 0.6, 5: 0.4}),
        ((1.0, 0.0, 1.0, 0.0), {2: 1.0, 3: 0.0, 4: 1.0, 5: 0.0}),
        ((0.0, 1.0, 0.5), {2: 0.0, 3: 2 / 3, 4: 5 / 6, 5: 0.5}),
    ],
)
def test_a_schedule_runs_straight_between_its_knots(strengths, expected):
    assert Setting(layers=(2, 5), strengths=strengths).schedule() == pytest.approx(expected)


@pytest.mark.parametrize("count", [2, 14, 23, 24, 26, 27, 30, 36, 39])
def test_a_knot_for_every_layer_is_its_strength_exactly(count):
    """In float arithmetic a layer that is left alone would get 2e-15, and be fitted."""
    strengths = tuple(float(i % 3 == 0) for i in range(count))
    made = Setting(layers=(5, 4 + count), strengths=strengths).schedule()
    assert made == {5 + i: strength for i, strength in enumerate(strengths)}


@pytest.mark.parametrize(
    "strengths, name",
    [
        ((1.0,), "layers 2-5, tokens, shrinkage 0.01, strength 1"),
        ((0.5, 0.5), "layers 2-5, tokens, shrinkage 0.01, strength 0.5"),
        ((1.0, 1.0, 0.0, 1.0), "layers 2-3,5, tokens, shrinkage 0.01, strength 1"),
        ((0.0, 2.0, 0.0, 0.0), "layers 3, tokens, shrinkage 0.01, strength 2"),
        ((1.0, 0.0), "layers 2-5, tokens, shrinkage 0.01, strength 1 0"),
        ((0.0,), "layers 2-5, tokens, shrinkage 0.01, strength 0"),
    ],
)
def test_a_name_says_which_layers_are_edited(strengths, name):
    assert Setting(layers=(2, 5), strengths=strengths).name == f"oblique, {name}"


def test_a_schedule_of_one_layer_takes_the_first_strength():
    assert Setting(layers=(3, 3), strengths=(0.5, 2.0)).schedule() == {3: 0.5}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "deviations"}, "needs pairs of prompts"),
        ({"pool": "sequential", "method": "centroids"}, "is for leace and oblique at mlp_out"),
        ({"pool": "sequential", "site": "resid_post"}, "is for leace and oblique at mlp_out"),
        ({"method": "leace", "offset": True}, "has its own offset"),
        ({"site": "resid_post", "offset": True}, "the mean at mlp_out"),
    ],
)
def test_a_setting_that_cannot_be_says_why(changes, message):
    assert message in impossible(replace(Setting(), **changes))
    assert impossible(Setting()) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("[search]", "search.space is empty"),
        ("[search]\ntrial = 3\n[search.space]\nrank = [1]", "unknown setting 'search.trial': choose from search.basel"),
        ("[search]\ntrials = 0\n[search.space]\nrank = [1]", "search.trials is 0, not a whole number of at least 1"),
        ("[search]\ntrials = true\n[search.space]\nrank = [1]", "search.trials is True, not a whole number"),
        ("[search]\ncontrols = -1\n[search.space]\nrank = [1]", "search.controls is -1, not a whole number of at lea"),
        ("[search]\nobjectives = 3\n[search.space]\nrank = [1]", "search.objectives is 3, not a list"),
        ("[search]\nobjectives = ['damage', 'joy']\n[search.space]\nrank = [1]", "search.objectives has 'joy'; known"),
        ("[search]\nobjectives = ['damage']\n[search.space]\nrank = [1]", "not two or more different ones"),
        ("[search]\nchoose = 'fidelity'\n[search.space]\nrank = [1]", "'fidelity' is not in search.objectives"),
        ("[search]\nlimits = {means = 1}\n[search.space]\nrank = [1]", "'means' is not in search.objectives"),
        ("[search]\nlimits = {damage = 1}\n[search.space]\nrank = [1]", "which is what search.choose makes best"),
        ("[search]\nlimits = {probe = 'base'}\n[search.space]\nrank = [1]", "neither a number nor"),
        ("[search]\nlimits = 1\n[search.space]\nrank = [1]", "search.limits is 1, not a table"),
        ("[search]\nspace = 3", "search.space is 3, not a table of settings"),
        ("[search.space]\nsize = [1]", "unknown setting 'search.space.size'"),
        ("[search.space]\nrank = 3", "search.space.rank is 3, not a list of choices or a range"),
        ("[search.space]\nrank = []", r"search.space.rank is \[\], not a list"),
        ("[search.space]\nrank = [0]", "search.space.rank has 0, not a whole number of at least 1"),
        ("[search.space]\nrank = {low = 1}", "not a list of choices or a range"),
        ("[search.space]\nrank = {low = 5, high = 2}", "low must be at most high"),
        ("[search.space]\nrank = {low = 1.5, high = 2}", "search.space.rank has 1.5, not a whole number"),
        ("[search.space]\nshrinkage = {low = 0, high = 1, log = true}", "above 0 if log is true"),
        ("[search.space]\nshrinkage = [2]", "search.space.shrinkage has 2, not a number from 0 to 1"),
        ("[search.space]\nstrength = [nan]", "search.space.strength has nan, not a number"),
        ("[search.space]\nmethod = ['pca']", "search.space.method has 'pca'; known: deviations, centroids, leace"),
        ("[search.space]\nmethod = {low = 1, high = 2}", "search.space.method is .* not a list of choices."),
        ("[search.space]\noffset = [1]", "search.space.offset has 1; known: true, false"),
        ("[search.baseline]\nmethod = 'deviations'\n[search.space]\nrank = [1]", "search.baseline cannot be fitted"),
        ("[search.baseline]\nrank = 'x'\n[search.space]\nrank = [1]", "search.baseline.rank has 'x', not a whole"),
        ("[search]\nobjectives = [['damage'], 'probe']\n[search.space]\nrank = [1]", r"objectives has \['damage'\]"),
        ("seed = -1", "seed is -1, not a whole number from 0"),
        ("seed = 'x'", "seed is 'x', not a whole number from 0"),
        ("[grid]\nrank = [1]\n[search.space]\nrank = [1]", r"has a \[grid\] and a \[search\]"),
        ("test = 'all'\n[search.space]\nrank = [1]", "test is 'all': a search reports its choice"),
    ],
)
def test_a_search_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "search.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_grid(tmp_path / "search.toml")


@pytest.mark.parametrize(
    "held, mode, message",
    [
        ({"space": {"method": ["deviations"]}}, "hook", "nothing of search.space can be made at mlp_out: deviations n"),
        ({"space": {"site": ["mlp_out", "resid_post"], "pool": ["sequential"]}}, "hook", "can be made at resid_post"),
        ({"space": {"method": ["leace"]}}, "lora", "an adapter cannot hold an offset"),
        ({"space": {"rank": [1]}, "baseline": {"offset": True}}, "lora", "search.baseline cannot be made in mode lora"),
    ],
)
def test_a_space_of_which_nothing_can_be_is_refused(held, mode, message):
    with pytest.raises(UserError, match=message):
        check_space(read_search(held, "x"), 8, mode)


def test_only_what_can_be_together_is_drawn():
    """Without a pool in the space it is the baseline's, tokens, which deviations cannot use. lora has no offset."""
    search = read_search({"space": {"method": ["deviations", "oblique", "leace"], "offset": [True, False]}}, "x")
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [search.draw(study.ask(), 8) for _ in range(60)]
    assert {(s.method, s.offset) for s in drawn} == {("oblique", True), ("oblique", False), ("leace", False)}
    assert {(s.method, s.offset) for s in (search.draw(study.ask(), 8, "lora") for _ in range(20))} == {
        ("oblique", False)
    }
    centroids = read_search({"space": {"method": ["centroids"], "shrinkage": [0.1, 0.5]}}, "x")
    assert {centroids.draw(study.ask(), 8).shrinkage for _ in range(20)} == {Setting().shrinkage}  # it has none


@pytest.mark.parametrize("part", ["baseline", "space"])
def test_a_layer_that_the_model_lacks_is_refused(part):
    held = {"space": {"rank": [1]}} | {part: {"last_layer": 9 if part == "baseline" else {"low": 1, "high": 9}}}
    with pytest.raises(UserError, match=f"search.{part}.last_layer has 9; the model has layers 0 to 7"):
        check_space(read_search(held, "x"), 8)
    check_space(read_search(held, "x"), 10)
