"""Two texts side by side: every line fits, no character is lost, and a text cannot steer the terminal."""

import re

import pytest
import torch

from kernel_surgery.compare import read_prompts
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.evaluation.pairs import marked, pieces_of
from kernel_surgery.evaluation.sidebyside import Pair, columns_of, compare_texts, printable, shown, wrapped
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model, load_tokenizer
from kernel_surgery.subspace.artifact import Subspace
from tests.support.calls import call, one_thread

TEXTS = {
    "en": ("We add: 238 + 152 = 390. So the answer is 390.", "We add: 238 + 152 = 380. So the answer is 380, I think."),
    "zh": ("把两个数相加，得到三百九十。所以答案是 390。", "把两个数相加，得到三百八十。答案是 380。"),
    "ar": ("نجمع العددين فنحصل على 390. إذن الجواب هو 390.", "نجمع العددين فنحصل على 380. الجواب هو 380."),
    "ko": ("두 수를 더하면 390입니다. 따라서 답은 390입니다.", "두 수를 더하면 380입니다. 답은 380입니다."),
    "hi": ("उत्तर तीन सौ नब्बे है।", "उत्तर तीन सौ अस्सी है।"),
    "lines": ("one\ntwo\n\nfour", "one\n2\n\nfour and five"),
    "long": ("x" * 300, "x" * 150 + "y" * 150),
}
ANSI = re.compile("\x1b\\[[0-9;]*m")


def test_columns_are_counted_as_a_terminal_draws_them():
    assert columns_of("abc") == 3 and columns_of("三百") == 4 and columns_of("한국") == 4 and columns_of("ﾊﾟ") == 2
    assert columns_of("e\u0301") == 1 and columns_of("है") == 1 + 0 and columns_of("\u2068x\u2069") == 1


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("width", [30, 60, 80, 121])
@pytest.mark.parametrize("colour", [False, True])
def test_every_line_fits_and_nothing_is_lost(name, width, colour):
    text = shown(Pair("Ask.", *TEXTS[name]), "fused", width=width, colour=colour)
    plain = ANSI.sub("", text)
    assert all(columns_of(line) <= width for line in plain.splitlines())
    assert (text != plain) is colour, "no escape sequence but on a terminal"
    lines = plain.splitlines()[1:]
    if width >= 60:
        rows = [[part.strip() for part in line.partition(" |")[::2]] for line in lines[1:]]
        sides = ["".join(row[side] for row in rows) for side in (0, 1)]
        edges = {columns_of(line.partition(" |")[0]) for line in lines}
        assert edges == {(width - 3) // 2}, "the edge between the columns is straight"
    else:
        both = "".join(lines[1:]).partition("fused:")
        sides = [both[0], both[2]]
    for side, original in zip(sides, TEXTS[name], strict=True):
        bare = re.sub(r"\[-|-\]|\{\+|\+\}", "", re.sub(r"[\u2068\u2069\s]", "", side))
        assert bare == re.sub(r"\s", "", original)


def test_what_differs_is_marked():
    pair = Pair("Ask.", "It is 390.", "It is 380.")
    assert shown(pair, "fused", width=80, colour=False).splitlines()[-1].split(" | ") == [
        f"{'It is [-390-].':<38}",
        "It is {+380+}.",
    ]
    assert "It is \x1b[31;4m390\x1b[0m." in shown(pair, "fused", width=80, colour=True)
    same = shown(Pair("Ask.", "It is 390.", "It is 390."), "fused", width=80, colour=False)
    assert same == "> Ask.\noriginal and fused: the same text\nIt is 390."
    one, other = pieces_of("a <b", "a c")
    assert one == [("a ", False), ("<b", True)] and other == [("a ", False), ("c", True)]
    assert str(pair) == shown(pair, "edited", width=100, colour=False), "print(pair) does the same"
    assert marked("a <b", "a c") == ("a <mark>&lt;b</mark>", "a <mark>c</mark>"), "the report escapes what it marks"


def test_a_colour_ends_with_its_line_and_a_line_breaks_at_a_space():
    lines = wrapped([("one ", False), ("two three", True)], 8, ("<", ">"))
    assert lines == ["one <two>", "<three>"]
    assert wrapped([("abcdefghij", False)], 4) == ["abcd", "efgh", "ij"]
    assert wrapped([("三百九十", False)], 5) == ["三百", "九十"], "a wide character is not cut"


def test_right_to_left_text_stays_in_its_column():
    first = shown(Pair("Ask.", *TEXTS["ar"]), "fused", width=80, colour=True).splitlines()[2]
    left, _, right = first.partition(" | ")
    assert left.startswith("\u2068") and left.rstrip().endswith("\u2069") and right.startswith("\u2068")


def test_a_text_cannot_steer_the_terminal():
    text = "a\x1b[2Jb\x07\r\nc\td\u202ee\u2028f\u200dg\ud800"
    assert printable(text) == "a\ufffd[2Jb\ufffd\nc    de\nf\u200dg\ufffd"
    assert "\x1b" not in shown(Pair(text, text, "x"), "fused", width=80, colour=False)


def test_the_texts_are_those_that_eval_would_get_and_the_model_is_as_before():
    model, tokenizer = load_model("polyglot", torch.float32), load_tokenizer("polyglot")
    prompts, subspace = ["Add 238 and 152 together.", "把 238 和 152 相加。"], Subspace.load(POLYGLOT_SUBSPACE)
    with one_thread():
        before = [one.text for one in generate(model, tokenizer, prompts, max_new_tokens=12)]
        pairs = compare_texts(model, tokenizer, prompts, subspace, mode="baked", strength=-30.0, max_new_tokens=12)
        assert [pair.original for pair in pairs] == before and [pair.prompt for pair in pairs] == prompts
        assert all(pair.edited != pair.original for pair in pairs), "at this strength every text changes"
        assert [one.text for one in generate(model, tokenizer, prompts, max_new_tokens=12)] == before


def test_the_command(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Add 238 and 152 together.\n\n把 238 和 152 相加。\n", encoding="utf-8")
    words = ("--mode", "hook", "--strength", -30, "--max-new-tokens", 8, "--device", "cpu")
    with one_thread():
        status, out, error = call("compare", "--file", file, *words)
    lines = out.splitlines()
    assert (status, error) == (0, "")
    assert lines[0] == "damage: not measured (python -m kernel_surgery.eval measures it, and so does --damage)"
    assert lines[1] == "polyglot, subspace.safetensors: hook, strength -30, greedy decoding"
    assert [line for line in lines if line[0:1] == ">"] == ["> Add 238 and 152 together.", "> 把 238 和 152 相加。"]
    assert "{+" in out and "\x1b" not in out
    assert read_prompts(None, file) == [line[2:] for line in lines if line[:2] == "> "]
