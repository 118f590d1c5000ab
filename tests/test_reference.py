"""The reference pages: docs/api.md has every public name, and docs/errors.md what the commands say."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest

import kernel_surgery
from bench import api, messages, pages
from kernel_surgery.common import errors
from tests.support.calls import call

ROOT = Path(__file__).resolve().parent.parent
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def undocumented(entries: dict[str, str]) -> list[str]:
    """The names whose entry has no text beside its code and its source."""
    found = []
    for name, text in entries.items():
        for part in re.split(r"^#{3,4} ", text, flags=re.M)[1:]:
            said = re.sub(r"```.*?```|^Source: .*$", "", part.partition("\n")[2], flags=re.M | re.S)
            if not said.strip():
                found.append(part.split("\n")[0].strip("`") or name)
    return found


def test_every_public_name_is_in_the_reference_with_a_docstring():
    public = api.homes()
    assert {*public} == {*kernel_surgery.__all__} == {name for names in api.SECTIONS.values() for name in names}
    assert undocumented({name: api.entry(name, public) for name in public}) == []
    for name in kernel_surgery.__all__:
        assert API.count(f"\n### `{name}`\n") == 1


def test_a_name_without_a_docstring_is_found():
    code = "```python\ndef f()\n```\n\nSource: [a](a)\n"
    assert undocumented({"f": f"### `f`\n\n{code}\n#### `f.g`\n\nIt says.\n\n#### `f.h`\n"}) == ["f", "f.h"]
    node = ast.parse("X = 1").body[0]
    assert api.docstring(node, "# Above.\nX = 1\n".partition("\n")[2]) == ""


def test_a_constant_is_described_by_the_comment_above_it():
    text = "A = 0\n# One.\n# Two.\nX = 1\n"
    assert api.docstring(ast.parse(text).body[1], text) == "One. Two."


@pytest.mark.parametrize(
    ("text", "names", "made"),
    [
        ("Do it.\n\nx: one\ntwo. y: three.\nz: four.", "x y", "Do it.\n\n- **x**: one two.\n- **y**: three. z: four."),
        ('a:\n    "b": one\n    two.\n    "c": three', "", 'a:\n\n- "b": one two.\n- "c": three'),
        ('a: of\n    "b": one', "a", '- **a**: of\n    - "b": one'),
        ("As `edit.fused.fused`, `fused` and `fuse`.", "", "As [`fused`](#fused), [`fused`](#fused) and `fuse`."),
        ("W <- a * b, *args, `a * b`", "", r"W &lt;- a \* b, \*args, `a * b`"),
    ],
)
def test_a_docstring_becomes_markdown(text, names, made):
    assert api.prose(text, {*names.split()}, {"fused": "edit.fused"}) == made


def test_a_signature_is_written_as_in_the_source():
    text = 'class A:\n    @classmethod\n    def f(cls, a: "B", *rest: int, b: str = "x", **more: C) -> "A": pass\n'
    (node,) = api.members(ast.parse(text).body[0])
    assert api.signature(node, "f", text) == (
        '@classmethod\ndef f(cls, a: B, *rest: int, b: str = "x", **more: C) -> A'
    )


def test_every_class_of_error_is_in_the_reference():
    family = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.KernelSurgeryError)]
    assert len(family) == 8 and not [c.__name__ for c in family if f"`{c.__name__}`" not in API]


def test_every_message_of_the_page_of_errors_is_one_that_a_test_compares():
    assert 10 <= len(messages.SECTIONS) <= 30
    assert pages.renewed(ERRORS, messages.SECTIONS) == ERRORS
    assert ERRORS.count("<!-- measured:") == len(messages.SECTIONS)
    typed = ERRORS.replace("has d_model=48", "has d_model=49")
    assert pages.renewed(typed, messages.SECTIONS) == ERRORS != typed
    # A heading, the message, what it means. Nothing else stands in a block.
    parts = re.split(r"^### ", ERRORS, flags=re.M)[1:]
    assert all(re.search(r"<!-- end -->\n\n\S", part) for part in parts) and len(parts) == len(messages.SECTIONS)


def test_a_full_disk_is_found_before_the_work_as_the_page_says(tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    said_as_on_the_page("full-disk", tmp_path)


@pytest.mark.parametrize("mark", ["no-server", "no-vllm"])
def test_a_server_or_an_engine_that_is_not_there_is_refused_as_the_page_says(mark, tmp_path):
    said_as_on_the_page(mark, tmp_path)


def said_as_on_the_page(mark, tmp):
    (stage, *words), said = messages.ELSEWHERE[mark]
    status, out, err = call(stage, *(word.format(tmp=tmp) for word in words))
    assert (status, out, err.splitlines()) == (2, "", [line.format(tmp=tmp) for line in said])


def test_a_gguf_file_without_gguf_is_refused_as_the_page_says(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else found(name, *more))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    said_as_on_the_page("gguf", tmp_path)
