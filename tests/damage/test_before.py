"""Damage before anything is written: what breaks the model is refused, what cannot be measured is said."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from kernel_surgery.common.errors import UserError
from kernel_surgery.damage import before
from kernel_surgery.damage.before import languages_measured, memory_needed
from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE
from kernel_surgery.subspace.artifact import Subspace
from tests.support.calls import call
from tests.support.picos import pico_of
from tests.support.quantised import save_quantised

GIVEN = ("--model", "polyglot", "--subspace", POLYGLOT_SUBSPACE)
CARD = {"bake": "README.md", "lora": "README.md"}


def first_of_card(folder):
    """The first line of a card's text, after its header and title."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("# "))
    return next(line for line in lines[title + 1 :] if line)


@pytest.mark.parametrize("command", CARD)
def test_an_edit_that_breaks_the_model_is_refused_unless_forced(command, tmp_path):
    out = tmp_path / "out"
    status, said, error = call(command, *GIVEN, "--strength", 30, "--languages", "en", "--out", out)
    assert status == 2 and not out.exists() and list(tmp_path.iterdir()) == []
    assert error.startswith("error: damage, ") and "BROKEN: the edited model no longer predicts ordinary text" in error
    assert "fit --method oblique. With --force it is written anyway." in error and error.count("\n") <= 3
    status, said, error = call(command, *GIVEN, "--strength", 30, "--languages", "en", "--force", "--out", out)
    assert (status, error) == (0, "") and "BROKEN" in said.splitlines()[0]
    assert "BROKEN" in first_of_card(out)
    record = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["damage"]
    assert said.splitlines()[0] == record["in_words"]
    mode = {"bake": "baked", "lora": "lora"}[command]
    assert record["verdict"][mode]["word"] == "broken" and set(record["neutral"][mode]) == {"en"}


@pytest.mark.parametrize("command", CARD)
def test_force_once_accepts_a_foreign_subspace_and_not_that_it_breaks_the_model(command, tmp_path):
    foreign, out = tmp_path / "foreign.safetensors", tmp_path / "out"
    replace(Subspace.load(POLYGLOT_SUBSPACE), fingerprint=None).save(foreign)
    words = (*("--model", "polyglot", "--subspace", foreign), "--languages", "en", "--out", out)
    assert "does not say which model it was fitted on" in call(command, *words)[2]
    status, said, error = call(command, *words, "--strength", 30, "--force")
    assert status == 2 and not out.exists() and "BROKEN: the edited model" in error
    assert "One --force accepts the subspace of other weights. With a second one the edit is written anyway." in error
    status, said, error = call(command, *words, "--strength", 30, "--force", "--force")
    assert (status, error) == (0, "") and "BROKEN" in said.splitlines()[0] and "BROKEN" in first_of_card(out)
    shutil.rmtree(out)
    assert call(command, *words, "--force")[0] == 0 and "was forced on" in (out / "README.md").read_text("utf-8")


def test_languages_of_the_fit_without_neutral_text_are_named(tmp_path):
    own, out = Subspace.load(POLYGLOT_SUBSPACE), tmp_path / "out"
    replace(own, fit=own.fit | {"languages": ["de", "es", "fr"]}).save(tmp_path / "own.safetensors")
    status, said, _ = call("bake", "--model", "polyglot", "--subspace", tmp_path / "own.safetensors", "--out", out)
    line = r"damage, baked: .* KL es .* Not measured in the fit's de, fr: there is no neutral text"
    assert status == 0 and re.fullmatch(line, said.splitlines()[0])
    assert said.splitlines()[0].lower() in first_of_card(out).lower()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "plain everyday sentences in es." in card and re.search(r"Here it is [\d.]+ times what 4 bits cost", card)
    error = call("eval", "--model", out, "--out", tmp_path / "run")[2]
    assert "was baked before" in error and "--mode original, or beside its original: --model ORIGINAL --baked" in error
    # What it was made for: an adapter has another kind, and a restored checkpoint other weights.
    status, _, error = call("bake", "--undo", "--model", out, "--out", tmp_path / "restored")
    assert (status, error) == (0, "")
    words = ("--model", tmp_path / "restored", "--subspace", POLYGLOT_SUBSPACE, "--out", tmp_path / "again")
    error = call("bake", *words)[2]
    assert "differs" in error and "was restored, to within a rounding: use the original's own folder" in error
    call("lora", *GIVEN, "--no-damage", "--out", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.base.md").read_bytes() == (POLYGLOT / "README.md").read_bytes()
    error = call("bake", "--undo", "--model", tmp_path / "adapter", "--out", tmp_path / "no")[2]
    assert "is an adapter from python -m kernel_surgery.lora" in error and "verify takes it as --adapter" in error


@pytest.mark.parametrize("command", CARD)
def test_a_harmless_edit_is_written_and_its_card_begins_with_the_damage(command, tmp_path):
    out = tmp_path / "out"
    status, said, error = call(command, *GIVEN, "--languages", "zh", "--out", out)
    assert (status, error) == (0, "")
    line = said.splitlines()[0]
    assert line.startswith("damage, ") and "like 4-bit. KL zh 0.05" in line
    assert first_of_card(out).lower() == f"**{line}.**".lower()
    if command == "bake":
        status, said, _ = call("verify", "--baked", out)
        assert status == 0 and said.splitlines()[0] == f"as the folder records it, not measured here: {line}"


def test_what_is_not_measured_is_said_with_the_reason(tmp_path, monkeypatch):
    out = tmp_path / "no"
    words = ("--no-damage", "--base-model", "org/model")
    status, said, _ = call("bake", *GIVEN, "--strength", 30, *words, "--out", out)
    assert 'base_model: "org/model"' in (out / "README.md").read_text(encoding="utf-8")
    assert status == 0 and said.splitlines()[0] == "damage: not measured (--no-damage)"
    assert first_of_card(out) == "**Damage: not measured (--no-damage).**"


@pytest.mark.parametrize("command", CARD)
def test_nothing_is_written_unasked_if_the_damage_cannot_be_measured(command, tmp_path, monkeypatch):
    monkeypatch.setattr(before, "memory_free", lambda device: 1000)
    status, said, error = call(command, *GIVEN, "--out", tmp_path / "small")
    assert status == 2 and list(tmp_path.iterdir()) == [] and said == ""
    assert error.startswith("error: the damage cannot be measured: on cpu the model needs 0.")
    assert "GB are free.\nThe edit may break the model." in error and "add --no-damage: then it is written" in error
    assert call(command, *GIVEN, "--no-damage", "--out", tmp_path / "small")[0] == 0


def test_a_model_too_large_for_the_gpu_is_measured_on_the_cpu(monkeypatch):
    monkeypatch.setattr(before, "parse_device", lambda: torch.device("cuda"))
    for free, where in (({"cuda": 10**9, "cpu": 0}, "cuda"), ({"cuda": 0, "cpu": 10**9}, "cpu")):
        monkeypatch.setattr(before, "memory_free", lambda device, free=free: free[device.type])
        assert before._place(POLYGLOT, 2)[0].type == where


def test_the_memory_that_is_needed_is_that_of_the_weights_and_some_logits():
    numbers = 1_773_696  # of the embedded model
    vocabulary = json.loads((POLYGLOT / "config.json").read_text())["vocab_size"]
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        needed = memory_needed(POLYGLOT, dtype) - 4 * before.LOGITS * 2 * vocabulary
        assert numbers * size <= needed <= 1.2 * numbers * size


def test_the_languages_are_those_of_the_fit_unless_others_are_asked_for():
    def languages(*fitted, asked=None):
        return languages_measured(asked, Subspace({0: torch.eye(4)[:, :1]}, site="mlp_out", fit={"languages": fitted}))

    assert languages("sw", "en", "ja") == ("sw", "en", "ja") and languages("sw", asked="en,ko") == ("en", "ko")
    assert languages("de", "es", "fr") == ("es",) and languages("de", "fr") == ("en", "zh") == languages()
    with pytest.raises(UserError, match="unknown language 'xx'"):
        languages("sw", asked="xx")
    two, seven = (memory_needed(POLYGLOT, torch.float32, count) for count in (2, 7))
    assert seven > two == memory_needed(POLYGLOT, torch.float32)


@pytest.mark.parametrize("name", ["int4-group", "int8-packed", "fp8-block"])
def test_packed_weights_count_as_the_floats_that_they_become(name, tmp_path):
    save_quantised(tmp_path / "quantised", name)
    pico_of("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    assert memory_needed(tmp_path / "quantised", torch.bfloat16) == memory_needed(tmp_path / "plain", torch.bfloat16)


def test_an_evaluation_of_a_broken_model_exits_0_and_says_so_first(tmp_path):
    words = ("--mode", "hook", "--strength", 30, "--problems", 1, "--max-new-tokens", 2, "--languages", "en")
    status, said, error = call("eval", *words, "--protocol", "strict", "--out", tmp_path / "run")
    assert (status, error) == (0, "") and said.startswith("damage, hook: BROKEN: the edited model no longer predicts")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert next(iter(results)) == "damage_in_words" and results["damage"]["verdict"]["hook"]["word"] == "broken"
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.index("This edit breaks the model") < page.index("<nav>") < page.index("BROKEN: the edited model")
