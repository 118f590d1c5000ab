"""Every command ends with what it wrote and with the next command, which that command's own parser accepts.

The chain is run as a user would: each printed line is copied, and run. It must get from activations to a certificate.
"""

import importlib
import json
import re
import shlex

import pytest

from kernel_surgery.common import ending
from kernel_surgery.common.ending import Following, free, in_bytes, next_command, one_of_several, quoted, strength_words
from kernel_surgery.evaluation.following import after_evaluation
from kernel_surgery.evaluation.options import Options
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, findable
from tests.support.calls import call

MORE = {
    "eval": ("--problems", 1, "--max-new-tokens", 8, "--no-damage", "--out", "the run"),
    "bake": ("--no-damage",),
    "lora": ("--no-damage",),
    "verify": (),
    "fit": (),
}


def next_of(text: str) -> tuple[str, list[str]]:
    """The (command, words) of the last line, once its own parser has read them."""
    last = text.rstrip("\n").split("\n")[-1]
    assert last.startswith("next: python -m kernel_surgery."), text
    words = shlex.split(last.removeprefix("next: "))
    name = words[2].removeprefix("kernel_surgery.")
    importlib.import_module(f"kernel_surgery.{name}").parser().parse_args(words[3:])
    return name, words[3:]


def ended(*words, status=0, stream=1):
    found = call(*words)
    assert found[0] == status, found
    return found[stream]


def wrote(text: str) -> list[str]:
    return re.findall(r"^wrote (.+) \(\d+(?:\.\d)? (?:bytes|kB|MB|GB)\)$", text, re.MULTILINE)


def test_the_printed_commands_lead_from_activations_to_a_certified_checkpoint(tmp_path, monkeypatch):
    """A folder with a space, and every command as it was printed."""
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    (tmp_path / "my runs" / "subspace.safetensors").write_bytes(b"taken")
    said = ended("collect", "--problems", 1, "--out", "my acts.safetensors")
    assert wrote(said) == ["'my acts.safetensors'"]
    name, words = next_of(said)
    assert (name, words[-1]) == ("fit", "subspace-2.safetensors")
    ran = []
    while name not in ran:
        ran.append(name)
        said = ended(name, *words, *MORE[name])
        assert wrote(said) or name == "verify"
        if name == "eval":
            assert "\nopen: 'the run/report.html'\n" in said
        name, words = next_of(said)
    assert ran == ["fit", "eval", "bake", "verify"] and (name, words[-2:]) == ("eval", ["--baked", "edited"])
    # What was baked is undone, and that is checked too.
    said = ended("bake", "--undo", "--model", "edited", "--out", "restored")
    name, words = next_of(said)
    assert (name, words) == ("verify", ["--restored", "restored", "--model", "polyglot"])
    name, words = next_of(ended(name, *words))
    assert (name, words) == ("eval", ["--mode", "original", "--model", "restored"])


def test_an_adapter_leads_to_its_certificate_and_that_to_its_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit = ("--model", "polyglot", "--subspace", POLYGLOT_SUBSPACE)
    said = ended("lora", *edit, "--strength", 2, "--out", "an adapter", "--no-damage")
    assert "--lora-modules 'edited=an adapter'" in said and wrote(said) == ["'an adapter'"]
    name, words = next_of(said)
    said = ended(name, *words, "--out", "c.json")
    assert wrote(said) == ["c.json", "c.svg", "c.html"] and "\nopen: c.html\n" in said
    name, words = next_of(said)
    assert words == ["--model", "polyglot", "--adapter", "an adapter", "--certificate", "c.json"]
    # Of a broken one it says what to look at.
    (tmp_path / "an adapter" / "adapter_config.json").write_text("{}")
    said = ended("verify", "--adapter", "an adapter", "--out", "d.json", status=1)
    assert said.endswith('look at: the lines above that begin with "fault:", also in "faults" of d.json\n')


def test_compare_keeps_the_edit_it_showed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("12 + 7?", "--mode", "hook", "--strength", "-0.5", "--max-new-tokens", 2, "--chat", "off")
    name, words = next_of(ended("compare", *words))
    assert (name, words) == ("eval", ["--mode", "hook", "--model", "polyglot", "--strength=-0.5", "--chat=off"])


def test_score_keeps_its_output_clean(tmp_path):
    line = {"text": "It is 3.", "answer": 3, "language": "en", "prompt": "1 + 2?", "correct": True, "value": 3}
    (tmp_path / "texts.jsonl").write_text(json.dumps(line) + "\n")
    out, err = (ended("score", tmp_path / "texts.jsonl", stream=stream) for stream in (1, 2))
    assert [json.loads(row)["correct"] for row in out.splitlines()] == [True]
    name, words = next_of(err)
    assert (name, words) == ("score", [str(tmp_path / "texts-read.jsonl"), "--labels"])
    assert next_of(ended("score", tmp_path / "texts.jsonl", "--labels", stream=2))[0] == "score"


def test_the_original_leads_to_an_edit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--mode", "original", "--problems", 1, "--max-new-tokens", 4, "--no-damage", "--out", "run")
    assert next_of(ended("eval", *words)) == ("eval", ["--mode", "fused"])


@pytest.mark.slow
def test_a_wrecked_edit_leads_to_a_milder_one(tmp_path, monkeypatch):
    """The first script's subspace at a strength that breaks the model."""
    monkeypatch.chdir(tmp_path)
    common = ("--problems", 1, "--max-new-tokens", 4, "--languages", "en")
    said = ended("eval", *common, "--strength", 40, "--out", "wrecked")
    assert "BROKEN" in said and "The edit breaks the model. Try" in said
    name, words = next_of(said)
    assert name == "eval" and "--strength" not in words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verdict", "note"),
    [
        ("worse", "The edited model solves fewer problems (en, zh). To keep it all the same:"),
        ("no difference shown (n=5)", ""),
        ("improved", ""),
    ],
)
def test_an_edit_after_which_fewer_problems_are_solved_is_not_recommended_in_silence(verdict, note):
    rows = [{"language": language, "verdict": verdict} for language in ("en", "zh", "zh")]
    following = after_evaluation(Options(), {"paired": rows, "damage": None})
    assert following.name == "bake" and following.note == note


def test_a_study_and_a_bundle_say_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["problems = 1", "max_new_tokens = 8", "budget = 8", "[grid]", "rank = [2]", "strength = [2.0]"]
    (tmp_path / "grid.toml").write_text("\n".join(lines))
    said = ended("study", "grid.toml", "--out", "a study")
    assert wrote(said)[0].startswith("'a study': report.html, study.json, frozen.json")
    name, words = next_of(said)
    assert "a study/chosen.safetensors" in words and (name != "bake" or words[-4:-2] == ["--strength", "2"])
    said = ended("reproduce", "--model", "polyglot", "--out", "all", "--problems", 1)
    assert said.count("next: ") == said.count("open: ") == 1 and "\nopen: all/bundle/report.html\n" in said
    name, words = next_of(said)
    assert (name, words) == ("reproduce", ["--check", "all/bundle"])
    name, words = next_of(ended(name, *words))
    assert name == "reproduce" and words[:4] == ["--model", "polyglot", "--out", "again"] and "--problems" in words
    (tmp_path / "all" / "bundle" / "report.html").write_text("changed")
    said = ended("reproduce", "--check", "all", status=1)
    assert said.endswith('look at: the lines above that begin with "fault:"\n')


def test_aot_and_dequantize_say_what_comes_next(tmp_path, monkeypatch):
    from kernel_surgery.models import load
    from kernel_surgery.ops import compiled

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SMOLLM2_FOLDER", load.POLYGLOT)  # already there
    said = ended("dequantize", "smollm2")
    assert next_of(said) == ("collect", ["--model", "smollm2", "--out", "acts.safetensors"])
    fields = {"sm": 90, "form": "whole", "dtype": "float16", "rows": 1, "d": 2, "k": 1}
    for name in ("CASES", "OBLIQUE_CASES", "CANDIDATES"):
        monkeypatch.setattr(compiled, name, getattr(compiled, name)[:1] if name == "CASES" else ())
    faulty = []

    class Made:
        sm, operation, form, dtype, rows, d, k, oblique = 90, "project", "whole", "float16", 1, 2, 1, False
        registers, spilled, late_loads, blocks, limit, in_flight, shared = 1, 0, 0, 1, "registers", 1, 1

        def faults(self):
            return ["spills"] if faulty else []

    monkeypatch.setattr(compiled, "compile_project", lambda *a, **k: Made())
    monkeypatch.setattr("kernel_surgery.aot.asdict", lambda made: dict(fields))
    said = ended("aot", "--out", "aot.json")
    assert wrote(said) == ["aot.json"] and next_of(said) == ("verify", ["--model", "polyglot", "--device", "cuda"])
    faulty.append(True)
    assert re.search(r"\nlook at: the (\d+) of \1 lines above that end in a fault\n$", ended("aot", status=1))


def test_a_model_without_a_place_is_named_beside_the_command(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("acts.npz", **{f"{lang}_L{i}": rng.normal(size=(8, 16)) for lang in ("en", "zh") for i in range(4)})
    said = ended("fit", "--activations", "acts.npz", "--out", "s.safetensors", "--model-id", "my-model")
    assert "\nDIR is the folder of my-model.\n" in said
    assert next_of(said)[1] == ["--mode", "fused", "--model", "DIR", "--subspace", "s.safetensors", "--force"]
    assert findable("my-model") is None and findable(None) is None
    assert findable("polyglot") == "polyglot" and findable("org/name") == "org/name"
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    assert findable("my-model") == "my-model"


def test_words_are_quoted_and_sizes_read(tmp_path, capsys, monkeypatch):
    from pathlib import Path

    assert quoted(Path("-x y")) == "'./-x y'" and quoted("it's") == "'it'\"'\"'s'"
    assert [in_bytes(n) for n in (0, 999, 1000, 250_000, 31_400_000_000)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "250 kB", "31.4 GB"),
    ]
    assert strength_words(1.0) == [] and strength_words(0.1) == ["--strength", "0.1"]
    assert strength_words(-1e-5) == ["--strength=-1e-05"] and float(strength_words(1 / 3)[1]) == 1 / 3
    for name in ("a.json", "a-2.json"):
        (tmp_path / name).touch()
    assert free(tmp_path / "a.json").name == "a-3.json" and free(tmp_path / "b").name == "b"
    with one_of_several():
        next_command(Following("fit"))
        ending.look_at("nothing")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("sys.argv", ["/usr/bin/kernel-surgery", "collect"])
    next_command(Following("fit", ["--rank", 3], "first:"))
    assert capsys.readouterr().out == "first:\nnext: kernel-surgery fit --rank 3\n"
