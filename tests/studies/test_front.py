"""The front as the terminal, the picture and the page show it."""

import json
import re
from pathlib import Path

import pytest

from kernel_surgery.studies.front import difference_in_words, pictures, record, reported_table, table
from kernel_surgery.studies.page import page, varying
from kernel_surgery.studies.searching import Row, choose
from kernel_surgery.studies.space import read_search
from tests.support.browser import check_width

STORED = Path(__file__).resolve().parents[2] / "docs" / "search-smollm2.json"

SEARCH = read_search({"space": {"rank": [1, 2]}}, "x")


def row(number, damage, probe, refused=None):
    figures = {} if refused else {"damage": damage, "probe": probe, "means": probe / 2, "kl": {"en": damage}}
    return Row(number, {}, f"oblique rank {number + 2} <b>", figures, refused)


ROWS = [row(-1, 0.2, 0.5), row(0, 0.1, 0.9), row(1, 0.15, 0.5), row(2, 0, 0, "no such rank\nmore"), row(3, 0.4, 0.3)]


def study(rows=ROWS):
    def figures(damage, probe, word="like 4-bit"):
        by = {"kl": {"en": damage, "zh": damage / 2}, "probe": probe, "means": probe / 2, "damage": damage}
        return by | {"word": word, "probe_ci95": [probe - 0.01, probe + 0.01]}

    measured = {"original": figures(0, 0.9), "baseline": figures(0.2, 0.5), "chosen": figures(0.15, 0.5)}
    measured |= {"haar:0": figures(0.3, 0.88), "matched:0": figures(0.1, 0.89)}
    return {
        "declared": {"model": "some <model>"},
        "damage_in_words": "damage, hook: like 4-bit.",
        "search": record(rows, SEARCH, choose(rows, SEARCH)),
        "frozen": {"sha256": "0123456789abcdef" * 4},
        "measured": measured,
        "difference": {"damage": {"en": [0.75, 0.7, 0.8], "zh": None}, "probe": [-0.01, -0.02, 0.0]},
    }


def test_the_terminal_shows_the_front_with_the_baseline_and_the_choice():
    lines = table(study()["search"]).split("\n")
    assert lines[0].startswith("4 settings and the baseline on dev, 1 of them refused. Choice: of the Pareto front")
    assert lines[1].split() == ["damage", "probe", "means"]
    # The baseline is beaten by row 1, so it is not on the front, and is shown all the same.
    assert [line.split()[0] for line in lines[2:]] == ["0.2000", "0.1000", "0.1500", "0.4000"]
    assert lines[2].endswith("<- baseline") and lines[4].endswith("<- chosen") and len(lines) == 6


def test_a_long_front_is_shortened_and_keeps_the_choice():
    rows = [row(-1, 9, 0.5), *(row(i, 1 + i, 0.9 - i / 100) for i in range(60))]
    made = table(record(rows, SEARCH, rows[42]))
    assert "<- chosen" in made and len(made.split("\n")) <= 17 and "more; all are in study.json" in made


def test_the_test_half_is_shown_beside_random_edits():
    made = reported_table(study())
    assert made.split("\n")[0].split() == ["on", "test:", "KL", "en", "KL", "zh", "probe", "means", "in", "words"]
    assert "matched:0" in made and "original     0.0000     0.0000     0.9000     0.4500\n" in made
    assert made.endswith("KL en x0.75 (0.70 to 0.80), zh not comparable; probe -0.0100 (-0.0200 to +0.0000)")
    assert difference_in_words(study()["difference"]) in made


def test_the_picture_has_a_panel_of_settings_and_one_of_controls():
    settings, controls = pictures(study())
    for word in ("baseline", "chosen", "damage: KL", "accuracy of a probe", "dev: 4 settings"):
        assert word in settings
    for word in ("original", "uniform random edit", "random edit by covariance", "chosen"):
        assert word in controls


@pytest.mark.parametrize("objective", ["accuracy", "fidelity"])
def test_an_objective_of_answers_has_the_dev_panel_alone(objective):
    search = read_search({"space": {"rank": [1]}, "objectives": ["damage", objective]}, "x")
    rows = [Row(r.number, {}, r.name, r.figures | {objective: 0.5}) for r in ROWS if not r.refused]
    made = pictures(study() | {"search": record(rows, search, choose(rows, search))})
    assert len(made) == 1 and "dev: 4 settings" in made[0]


def test_the_page_is_one_file_that_fetches_nothing_and_escapes_names():
    made = page(study())
    assert "<title>Search: some &lt;model&gt;</title>" in made and "rank 3 &lt;b&gt;" in made
    assert not re.search(r'(src|href)="?https?:', made) and made.count("<svg xmlns") == 2
    assert (
        "refused: no such rank" in made and "chosen, front" in made and "more" not in made.partition("All settings")[2]
    )
    assert "damage, hook: like 4-bit." in made and "0123456789abcdef" in made


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_real_search_is_not_wider_than_the_screen(tmp_path, width):
    text = page(json.loads(STORED.read_text(encoding="utf-8")))
    check_width(tmp_path / "page.html", text, width, 2)


GRID = STORED.parent / "retest.json"


def test_the_page_of_a_grid_has_the_choice_on_test_around_zero_and_every_setting():
    study = json.loads(GRID.read_text(encoding="utf-8"))
    made = page(study)
    chosen = study["frozen"]["cell"]
    first = made.partition("<nav>")[0]
    assert f"Chosen: {chosen}. On test: no difference in accuracy shown." in first
    # The two languages and both together, for the choice alone; all settings stand below.
    assert first.count("<svg aria-hidden") == 3 and made.count("<h2>All settings on test</h2>") == 1
    assert "rank=10 site=mlp_out strength=2.0<" in made, "words that all settings share are left out"
    worse = [r for r in study["paired"] if r["verdict"] == "worse"]
    assert worse and made.count("-0.172 worse") == sum(f"{r['delta']:+.3f}" == "-0.172" for r in worse)


def test_words_that_all_settings_share_are_left_out_of_their_names():
    assert varying(["a=1 b=2", "a=1 b=3"]) == {"a=1 b=2": "b=2", "a=1 b=3": "b=3"}
    assert varying(["a=1 b=2"]) == {"a=1 b=2": "a=1 b=2"}
