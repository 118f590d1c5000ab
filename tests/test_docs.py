"""What the pages of docs/ say is so: their commands parse, the options that they name exist, their snippets run."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from kernel_surgery.__main__ import COMMANDS
from kernel_surgery.common.errors import ModelError
from kernel_surgery.evaluation.external import check_labels, label_table, read_lines, scored, summary_table
from kernel_surgery.files.problems import problem_source
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.studies.declaring import read_grid
from tests.support.calls import call

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("docs/**/*.md"))}
COMMAND = r"(?:python -m |-m )((?:kernel_surgery|bench)[.\w]*)|kernel-surgery (\w+)"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
PRINTED = re.compile("<!-- measured: .*?<!-- end -->", re.S)  # what commands have written there


def module_of(match: re.Match) -> str:
    """The module whose parser reads a command."""
    if match[2]:
        return f"kernel_surgery.{match[2]}"
    return {"bench": "bench.__main__", "kernel_surgery": "kernel_surgery.__main__"}.get(match[1], match[1])


def parser_of(module: str) -> argparse.ArgumentParser:
    return importlib.import_module(module).parser()


def typed(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(module, words) of every command that a reader can type: in fenced and in indented blocks, or printed as next."""
    text = PRINTED.sub("", text)
    lines = [line for kind, body in FENCE.findall(text) if kind in ("bash", "text") for line in lines_of(kind, body)]
    lines += [line for body in INDENTED.findall(FENCE.sub("", text)) for line in lines_of("bash", body)]
    found = []
    for line in lines:
        if match := re.search(COMMAND, line):
            words = shlex.split(re.split(r" (?:&&|\||>|2>) ", line[match.end() :])[0], comments=True)
            found.append((module_of(match), tuple(word for word in words if word != "...")))
    return found


def lines_of(kind: str, body: str) -> list[str]:
    """The lines of a block that may hold a command: of what was printed, those that are one."""
    lines = body.replace("\\\n", " ").splitlines()
    if kind == "bash":
        return lines
    return [] if body.startswith("error:") else [line for line in lines if re.match(rf"(?:next: )?(?:{COMMAND})", line)]


def mentioned(text: str) -> list[tuple[str, list[str]]]:
    """(module, options) of every command in a sentence, which may leave out what it needs."""
    found = []
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        if match := re.match(COMMAND, code):
            found.append((module_of(match), re.findall(r"(?<!\S)--[\w-]+", code)))
    return found


TYPED = sorted({(page, *command) for page, text in PAGES.items() for command in typed(text)})


def test_there_are_commands_to_check():
    assert {f"kernel_surgery.{name}" for name in COMMANDS} <= {module for _, module, _ in TYPED}


@pytest.mark.parametrize("page, module, words", TYPED, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_of_a_page_is_one_that_its_parser_takes(page, module, words):
    if module.endswith("__main__") or "--list-models" in words:  # they print and stop, as --help does
        assert words in ((), ("--list-models",)) or module == "bench.__main__"
        return
    parser_of(module).parse_args(words)
    with pytest.raises(SystemExit):  # the check can fail
        parser_of(module).parse_args(["--no-such-option", *words])


@pytest.mark.parametrize("page", PAGES)
def test_every_option_of_a_command_in_a_sentence_exists(page):
    for module, options in mentioned(PAGES[page]):
        if not module.endswith("__main__") and options:
            known = parser_of(module)._option_string_actions
            assert not [option for option in options if option not in known], module


def sections() -> dict[str, str]:
    """{command: its section} of docs/commands.md."""
    parts = re.split(r"^## (\w+)\n", PAGES["docs/commands.md"], flags=re.M)
    return {name: body.partition("\n## ")[0] for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_reference_has_a_section_for_each_command():
    assert [name for name in sections() if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_of_the_reference_names_options_of_its_command(name):
    known = parser_of(f"kernel_surgery.{name}")._option_string_actions
    words = re.findall(r"`([^`]*)`", FENCE.sub("", sections()[name]))
    here = [word for word in words if word.startswith("--")]
    assert not [word for word in here if word.split()[0].split("|")[0] not in known]


def test_the_snippets_of_the_page_of_modes_run(capsys):
    first, second = re.findall(r"<!-- tested: modes -->\n```python\n(.*?)```", PAGES["docs/modes.md"], re.S)
    names: dict = {}
    exec(compile(first, "docs/modes.md", "exec"), names)
    assert "238+152" in capsys.readouterr().out
    exec(compile(second, "docs/modes.md", "exec"), names)
    assert capsys.readouterr().out.strip() == str([True] * 3 + [False] + [True] * 4)


JUDGE = "docs/how-to/judge-your-own-texts.md"


def test_the_verdicts_that_a_page_shows_are_the_scorers(tmp_path):
    blocks = [body for _, body in FENCE.findall(PAGES[JUDGE])]
    texts, _, verdicts, summary, labelled, _, table, problems = blocks[:8]
    (tmp_path / "texts.jsonl").write_text(texts, encoding="utf-8")
    lines = [scored(line) for line in read_lines(tmp_path / "texts.jsonl")]
    for line, shown in zip(lines, verdicts.splitlines(), strict=True):
        held = json.loads(shown.replace("{...,", "{"))
        assert held.items() <= line.items() and set(held) == {"text", "extracted", "correct", "language_found"}
    assert summary_table(lines) == summary.strip()
    (tmp_path / "labelled.jsonl").write_text(labelled, encoding="utf-8")
    lines = read_lines(tmp_path / "labelled.jsonl")
    check_labels(tmp_path / "labelled.jsonl", lines)
    assert label_table(lines) == table.rstrip("\n")
    (tmp_path / "mine.jsonl").write_text(problems, encoding="utf-8")
    assert problem_source([str(tmp_path / "mine.jsonl")]).languages() == ("zh", "en")


@pytest.mark.parametrize("kind", ["grid", "search"])
def test_a_declaration_on_a_page_can_be_read(kind, tmp_path):
    found = [body for language, body in FENCE.findall(PAGES["docs/how-to/run-a-study.md"]) if language == "toml"]
    (declaration,) = [body for body in found if f"\n[{kind}]" in body]
    (tmp_path / f"{kind}.toml").write_text(declaration)
    assert kind in read_grid(tmp_path / f"{kind}.toml")


def test_the_architecture_that_a_page_adds_is_refused_as_it_shows():
    with pytest.raises(ModelError) as refused:
        layout_named("vaultgemma")
    assert f"error: {refused.value}\n" in PAGES["docs/how-to/add-an-architecture.md"]


@pytest.mark.slow
def test_what_a_reader_of_a_published_folder_sees_is_what_is_printed(tmp_path, monkeypatch):
    """The damage line of the page, with its figures, and the table: of the embedded model with a default fit."""
    monkeypatch.chdir(tmp_path)
    assert call("collect", "--out", "acts.safetensors")[0] == 0
    assert call("fit", "--activations", "acts.safetensors", "--out", "subspace.safetensors")[0] == 0
    assert call("bake", "--model", "polyglot", "--subspace", "subspace.safetensors", "--out", "EDITED")[0] == 0
    status, said, _ = call("verify", "--baked", "EDITED")
    page = PAGES["docs/how-to/publish-a-baked-model.md"]
    shown = next(body for _, body in FENCE.findall(page) if body.startswith("as the folder records it"))
    number = re.compile(r"\d+\.\d+(?:e-\d+)?")
    assert status == 0
    for line in (line.removesuffix(" ...") for line in shown.splitlines() if line != "..."):
        (same,) = [own for own in said.splitlines() if number.sub("#", own).startswith(number.sub("#", line))]
        pairs = zip(number.findall(line), number.findall(same), strict=False)
        # The last of three digits depends on the processor.
        assert all(float(a) == pytest.approx(float(b), rel=0.01) for a, b in pairs), (line, same)
