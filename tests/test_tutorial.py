"""The tutorial is so: its commands are typed in an empty folder, and what the page shows is what they print.

Figures depend on the processor and on how much is asked, so lines are compared without them. Texts of the models may
differ where two logits are close: of those only that they differ is checked.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from kernel_surgery.models.load import SMOLLM2_FOLDER
from tests.support.calls import call
from tests.support.neutral import fewer_sentences

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- not rerun: [^>]* -->\n)?^```(\w+)\n(.*?)^```", re.M | re.S)
SMALLER = {"--problems 5": "--problems 1", "--max-new-tokens 24": "--max-new-tokens 8", "--probed 10": "--probed 5"}
NUMBER = re.compile(r"\b[0-9a-f]{16}\b|[-+]?\d[\d.]*(?:e[-+]\d+)?")
LANGUAGE = re.compile(r"\((?:zh|en|es|ar|ja|ko|sw)\)")


def steps() -> list[tuple[str, str, list[str]]]:
    """(kind, what is typed, the lines that the page shows after it) of every step that is rerun."""
    found: list[tuple[str, str, list[str]]] = []
    for skipped, kind, body in BLOCK.findall(PAGE):
        if kind == "text":
            found[-1][2].extend(body.splitlines())
        elif not skipped:
            found.append((kind, body, []))
    return found


def plain(line: str) -> str:
    """A line without its figures, their languages, and the width of its columns."""
    return " ".join(NUMBER.sub("#", LANGUAGE.sub("(#)", line)).split())


def missing(shown: list[str], printed: str) -> list[str]:
    """The lines of the page that were not printed, in that order. "..." stands for lines, " | " for a model's text."""
    lines, absent = iter([plain(line) for line in printed.splitlines()]), []
    for line in shown:
        text_of_a_model = " | " in line and not line.startswith("original")
        if line.strip() in ("", "...") or text_of_a_model or (line.startswith("[-") and "|" in line):
            continue
        if plain(line) not in lines:  # this moves on in the lines
            absent.append(line)
            lines = iter([plain(again) for again in printed.splitlines()])
    return absent


def typed(kind: str, body: str) -> str:
    """What a step prints. Fails if a command does."""
    if kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(body, "docs/tutorial.md", "exec"), {})
        return out.getvalue()
    printed = ""
    for line in body.splitlines():
        for long, short in SMALLER.items():
            line = line.replace(long, short)
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"] and words[2].startswith("kernel_surgery.")
        status, out, err = call(words[2].removeprefix("kernel_surgery."), *words[3:])
        assert status == 0, err
        printed += out
    return printed


@pytest.mark.real
def test_the_commands_of_the_tutorial_print_what_it_shows(tmp_path, monkeypatch):
    assert (SMOLLM2_FOLDER / "config.json").is_file(), "fetch the model first: make smollm2"
    monkeypatch.chdir(tmp_path)
    fewer_sentences(monkeypatch, 2)
    assert len(steps()) == 11
    for kind, body, shown in steps():
        printed = typed(kind, body)
        assert not missing(shown, printed), printed
        if "compare" in body:
            (row,) = [line for line in printed.splitlines() if "Paris" in line]
            assert "[-" in row and "{+" in row  # the edited model answers otherwise


def test_a_line_that_is_not_printed_is_found():
    printed = "wrote a.json (37.6 MB)\nmode   lang  0.5\nlast\n"
    assert missing(["wrote a.json (1 MB)", "...", "mode lang 0.25"], printed) == []
    assert missing(["wrote b.json (1 MB)", "last"], printed) == ["wrote b.json (1 MB)"]
    assert missing(["last", "mode lang 0.5"], printed) == ["mode lang 0.5"]  # another order


def test_what_the_page_shows_has_the_figures_of_one_run():
    """The damage stands on the page twice, as bake and verify print it."""
    lines = re.findall(r"^(?:as the folder records it, not measured here: )?(damage, baked: .*)", PAGE, re.M)
    assert len(lines) == 2 and lines[0] == lines[1]
