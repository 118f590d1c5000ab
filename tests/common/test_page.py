"""The building blocks of the pages: intervals lie where their figures say, colours follow the reader's setting."""

import re

import pytest

from kernel_surgery.common.intervals import Axis, Row, around_zero, forest, of_sizes
from kernel_surgery.common.page import Card, contents, document, folded, opening
from kernel_surgery.common.plotting import COLOURS, PALETTE, figure, standalone, svg


@pytest.mark.parametrize(
    ("axis", "value", "percent"),
    [
        (Axis(-2, 2, ""), 0, 50),
        (Axis(-2, 2, ""), 1, 75),
        (Axis(-2, 2, ""), 5, 100),
        (Axis(-2, 2, ""), -5, 0),
        (Axis(0.001, 10, "", log=True), 0.1, 50),
        (Axis(0.001, 10, "", log=True), 0.0, 0),
        (Axis(0.001, 10, "", log=True), 1.0, 75),
    ],
)
def test_a_value_lies_where_the_axis_says(axis, value, percent):
    assert axis.at(value) == pytest.approx(percent)


def test_the_axis_of_differences_has_zero_in_the_middle_and_room_for_everything():
    rows = [Row("en", -0.3, -0.1, 0.05, ""), Row("zh", 0.0, 0.1, 0.2, "")]
    axis = around_zero(rows, "difference", 0.05)
    assert axis.at(0) == 50 and axis.low == -axis.high
    for row in rows:
        for value in (row.low, row.high):
            assert axis.low < value < axis.high
    assert axis.band == (-0.05, 0.05) and around_zero(rows, "", None).band is None
    # Differences that are all 0 still have an axis.
    assert around_zero([Row("en", 0, 0, 0, "")], "", None).high > 0


def test_the_axis_of_sizes_covers_whole_decades():
    axis = of_sizes([Row("a", 0.002, 0.004, 0.03, ""), Row("b", 0.5, 2.0, 3.0, ""), Row("none", 0, 0, 0, "")], "KL")
    assert (axis.low, axis.high) == pytest.approx((0.001, 10)) and axis.log
    assert axis.ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert of_sizes([Row("none", 0, 0, 0, "")], "KL").ticks()


def test_every_row_is_also_said_in_words():
    rows = [
        Row("en <b>", -0.1, 0.0, 0.1, "+0.000 none", "fused", True, "hook"),
        Row("zh", 0, 0.1, 0.2, "+0.100", group="hook"),
    ]
    text = forest(rows, around_zero(rows, "accuracy, edited minus original", 0.05))
    words = re.sub(r"<svg.*?</svg>", "", text)
    for said in ("en &lt;b&gt;", "+0.000 none", "zh", "+0.100", "accuracy, edited minus original"):
        assert said in words
    assert words.count(">hook<") == 1, "a group is named once"
    assert "NaN" not in text and "nan" not in text


def test_a_picture_takes_its_colours_from_the_page_and_a_file_brings_them_along():
    made, (axes,) = figure(3, 2)
    axes.plot([0, 1], [0, 1], color=COLOURS["fused"])
    axes.set_title("a title")
    picture = svg(made)
    assert f"var(--fused, {COLOURS['fused']})" in picture and "DejaVu" not in picture and "a title" in picture
    # Nothing is drawn in a colour that a dark page would not change; white would hide on one of them.
    assert not re.findall(r"(?:fill|stroke): #(?!000)[0-9a-f]{6}", picture)
    file = standalone(picture)
    assert "prefers-color-scheme:dark" in file and PALETTE["fused"][1] in file and file.count("<svg") == 1


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2, from 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_in_every_colour_can_be_read(dark):
    grounds = [PALETTE[name][dark] for name in ("ground", "card")]
    for name, values in PALETTE.items():
        if name in ("ground", "card", "line", "band", "mark"):
            continue
        least = 3.0 if name == "other" else 4.5  # "other" colours lines and dots, for which 3 is enough
        worst = min(_contrast(values[dark], ground) for ground in grounds)
        assert worst >= least, f"{name}: {worst:.2f}"
    assert _contrast(PALETTE["ink"][dark], PALETTE["mark"][dark]) >= 4.5


def test_a_page_escapes_what_it_is_given_and_leaves_out_what_is_empty():
    text = opening("over", "<model>", [("rank", "2"), ("engine", "")], "It <holds>.", [Card("a", "b", "c", "bad")])
    assert "&lt;model&gt;" in text and "It &lt;holds&gt;." in text and "engine" not in text
    assert '<div class="card bad">' in text
    listed = contents([("Here", "<p>x</p>"), ("Gone", "")])
    assert "Here" in listed and "Gone" not in listed and folded("x", "") == ""
    assert "<title>a &amp; b</title>" in document("a & b", "")
