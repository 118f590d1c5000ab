"""What the README says is so: its code runs, its commands parse, its links lead somewhere, its figures are real."""

import importlib
import json
import re
import shlex

import pytest

from bench.readme import KEPT, MARKS, ROOT, section, with_section

WHOLE = (ROOT / "README.md").read_text(encoding="utf-8")
README = re.sub("<!--.*?-->", "", WHOLE)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands():
    """[module, arguments] of every `python -m` command in the README, in a block or in a line."""
    found = re.findall(r"python -m (kernel_surgery[.\w]*|bench[.\w]*)([^\n`&|]*)", README)
    return [(module, shlex.split(arguments)) for module, arguments in found]


def test_the_python_examples_run_one_after_another(capsys):
    first, second = [text for language, text in BLOCKS if language == "python"]
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    assert "238+152" in capsys.readouterr().out
    exec(compile(second, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip() == str([True] * 3 + [False] + [True] * 4)


def test_there_are_two_set_up_commands_and_no_third():
    shell = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert [line for line in shell if "pip install" in line] == [
        "pip install -c constraints.txt -e . && python -m kernel_surgery.eval --mode fused",
        'pip install -c constraints.txt -e ".[test]" && python -m pytest',
    ]


@pytest.mark.parametrize("module, arguments", commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_is_one_that_its_parser_takes(module, arguments):
    parser = importlib.import_module(module).parser()
    parser.parse_args(arguments)
    with pytest.raises(SystemExit):  # the check can fail
        parser.parse_args([*arguments, "--no-such-option"])


def test_options_that_the_text_names_exist():
    named = set(re.findall(r"`(--[a-z-]+)", README))
    helps = " ".join(importlib.import_module(m).parser().format_help() for m in {m for m, _ in commands()})
    assert named and {option for option in named if option not in helps} == set()


def test_every_link_leads_to_a_file_or_a_heading():
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall("^#+ (.*)", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_table_is_what_was_measured():
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    assert with_section(WHOLE, results) == WHOLE, "run python -m bench.readme --results DIR"
    assert results["environment"]["dirty"] is False
    altered = json.loads(KEPT.read_text(encoding="utf-8"))
    altered["modes"]["original"]["en"]["correct"] -= 1
    assert section(altered) != section(results)
    with pytest.raises(ValueError, match="once each; nothing was written"):
        with_section(WHOLE.replace(MARKS[0], ""), results)
