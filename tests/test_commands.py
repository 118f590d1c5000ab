"""The command line as a user meets it: quick help, one clear error, nothing half-written, the four commands."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel_surgery import Subspace
from kernel_surgery.common.command import main
from kernel_surgery.evaluation import answering
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.models.load import POLYGLOT
from kernel_surgery.problems.generator import problems

STAGES = (
    *("collect", "fit", "aot", "bake", "lora", "verify", "eval", "score", "study", "reproduce", "dequantize"),
    *("compare", "probe", "polyglot.train", "polyglot.card"),
)


def call(stage, capsys, *words):
    """(exit status, stdout, stderr) of a stage, in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(importlib.import_module(f"kernel_surgery.{stage}").run, [str(w) for w in words])
    out, err = capsys.readouterr()
    return left.value.code, out, err


@pytest.mark.parametrize("stage", STAGES)
def test_help_answers_in_under_two_seconds(stage):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", f"kernel_surgery.{stage}", "--help"], capture_output=True, text=True)
    took = time.monotonic() - started
    print(f"{stage} --help: {took:.2f} s")
    assert done.returncode == 0 and f"python -m kernel_surgery.{stage}" in done.stdout
    assert took < 2


def test_help_imports_no_torch():
    """What the two seconds rest on; a slow machine cannot hide it."""
    code = (
        "import sys, importlib\n"
        f"for stage in {STAGES!r}:\n    importlib.import_module('kernel_surgery.' + stage).parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def foreign(tmp_path):
    """A subspace of the right shape that was fitted on another model."""
    from tests.support.models import pico

    config = json.loads((POLYGLOT / "config.json").read_text())
    other = Subspace.load(POLYGLOT.parent / "subspace.safetensors")

    from kernel_surgery.subspace.fingerprint import fingerprint

    stranger = pico("qwen2", num_hidden_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"])
    path = tmp_path / "foreign.safetensors"
    replace(other, fingerprint=fingerprint(stranger), model_id="somebody/else").save(path)
    return path


def errors(tmp_path, foreign):
    acts = tmp_path / "acts.npz"
    rng = np.random.default_rng(0)
    np.savez(acts, **{f"{lang}_L{i}": rng.normal(size=(8, 16)) for lang in ("en", "zh") for i in range(4)})
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, en_L0=np.array([{}], dtype=object))
    out = tmp_path / "out"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    shipped = Subspace.load(POLYGLOT.parent / "subspace.safetensors")
    wide, leaky = tmp_path / "wide.safetensors", tmp_path / "leaky.safetensors"
    replace(shipped, bases={i: torch.eye(shipped.d_model)[:, :65] for i in shipped.layers}).save(wide)
    replace(shipped, fit=shipped.fit | {"split": "test"}).save(leaky)
    return {
        "wrong model path": ("eval", "--model", tmp_path / "nowhere", "--out", out, "no model at"),
        "folder without a model": ("collect", "--model", tmp_path, "--out", out, "no config.json"),
        "wrong rank": ("fit", "--activations", acts, "--out", out, "--rank", 99, "cannot fit rank 99"),
        "rank zero": ("fit", "--activations", acts, "--out", out, "--rank", 0, "cannot fit rank 0"),
        "foreign subspace": ("eval", "--subspace", foreign, "--out", out, "somebody/else"),
        "foreign subspace baked": ("bake", "--model", "polyglot", "--subspace", foreign, "--out", out, "somebody/else"),
        "pickled npz": ("fit", "--activations", pickled, "--out", out, "Pickles are never loaded"),
        "layers out of range": (
            "collect",
            "--layers",
            "2-99",
            "--out",
            out,
            "layer 8 is out of range: the model has 8 layers",
        ),
        "layers not collected": ("fit", "--activations", acts, "--layers", "9-12", "--out", out, "9"),
        "layers that are no layers": ("collect", "--layers", "two", "--out", out, "two"),
        "unknown language": ("eval", "--languages", "en,fr", "--out", out, "'fr'"),
        "one language": ("collect", "--languages", "en", "--out", out, "at least two languages"),
        "no such subspace": ("eval", "--subspace", tmp_path / "none.safetensors", "--out", out, "none.safetensors"),
        "not a subspace": ("eval", "--subspace", broken, "--out", out, "broken.safetensors"),
        "too many problems": ("eval", "--problems", 100000, "--out", out, "exist"),
        "no subspace for a model": ("eval", "--model", POLYGLOT, "--out", out, "--subspace"),
        "expag in Spanish": ("eval", "--protocol", "expag", "--languages", "es", "--out", out, "'es'"),
        "unknown mode": ("eval", "--mode", "magic", "--out", out, "magic"),
        "budget of nothing": ("eval", "--max-new-tokens", 0, "--out", out, "at least 1"),
        "resume without a folder": ("eval", "--resume", "--resume needs --out"),
        "rank beyond the operator's": ("eval", "--subspace", wide, "--out", out, "k=65 columns, but project takes"),
        "fitted on the problems asked": ("eval", "--subspace", leaky, "--out", out, "fitted on the test problems"),
        "unknown controls": ("eval", "--controls", "gauss:3", "--out", out, "--controls takes haar:N"),
        "controls of the original": ("eval", "--mode", "original", "--controls", "haar:3", "--out", out, "edited mode"),
        "margin of nothing": ("eval", "--margin", 0, "--out", out, "--margin must be positive"),
        "no certificate": ("eval", "--certificate", POLYGLOT / "config.json", "--out", out, "is not a certificate"),
        "strength nan": ("eval", "--strength", "nan", "--out", out, "finite"),
        "bake at strength nan": (
            *("bake", "--model", "polyglot", "--strength", "nan"),
            *("--subspace", POLYGLOT.parent / "subspace.safetensors"),
            *("--out", out, "--strength must be a finite number of at most 3.4e+38, got nan"),
        ),
    }


CASES = (
    "wrong model path", "folder without a model", "wrong rank", "rank zero", "foreign subspace",
    "foreign subspace baked", "pickled npz", "layers out of range", "layers not collected", "layers that are no layers",
    "unknown language", "one language", "no such subspace", "not a subspace", "too many problems",
    "no subspace for a model", "unknown controls", "controls of the original", "margin of nothing", "no certificate",
    "expag in Spanish", "unknown mode", "budget of nothing", "resume without a folder",
    "rank beyond the operator's", "fitted on the problems asked", "strength nan", "bake at strength nan",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_clear_error_and_nothing_is_written(case, tmp_path, foreign, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = errors(tmp_path, foreign)
    assert set(cases) == set(CASES)
    stage, *words, message = cases[case]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(stage, capsys, *words)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_in_a_real_process_has_no_traceback(tmp_path):
    words = [sys.executable, "-m", "kernel_surgery.eval", "--model", str(tmp_path / "nowhere")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A randomly initialised model with Qwen2.5-3B's configuration fields at reduced depth and width."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1536,  # polyglot's tokenizer stands in for Qwen's
        hidden_size=128,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=2,
        hidden_act="silu",
        max_position_embeddings=32768,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
        use_sliding_window=False,
        max_window_layers=8,
        sliding_window=32768,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((POLYGLOT / name).read_bytes())
    return folder


@pytest.mark.slow
def test_the_four_commands_in_a_row(qwen, tmp_path, capsys):
    """collect, fit, bake, eval, as the README gives them; then the baked checkpoint answers like the in-memory edit."""
    acts, space, baked = tmp_path / "acts.safetensors", tmp_path / "subspace.safetensors", tmp_path / "edited"
    assert call("collect", capsys, "--model", qwen, "--out", acts, "--problems", 4)[0] == 0
    status, out, _ = call("fit", capsys, "--activations", acts, "--out", space)
    # At full rank all of it is captured by construction, so no line for each layer says so.
    assert status == 0 and "layers 2-5 of 8" in out and "holds  1.000 of what" in out and "captured" not in out
    assert call("bake", capsys, "--model", qwen, "--subspace", space, "--out", baked)[0] == 0
    common = ("--problems", 1, "--max-new-tokens", 6, "--dtype", "float32", "--no-damage")
    status, out, err = call(
        "eval", capsys, "--mode", "all", "--model", qwen, "--subspace", space, "--out", tmp_path / "all", *common
    )
    assert status == 0 and err == "" and out.count("no difference shown") == 12
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    assert list(results["modes"]) == ["original", "hook", "baked", "fused", "lora"]
    assert all(edit["layers"] == [2, 3, 4, 5] for edit in results["edits"].values())
    status, _, _ = call("eval", capsys, "--mode", "original", "--model", baked, "--out", tmp_path / "again", *common)
    assert status == 0
    # Editing the baked checkpoint once more is refused: it is not the model the subspace was measured on.
    status, _, err = call("eval", capsys, "--model", baked, "--subspace", space, "--out", tmp_path / "no", *common)
    assert status == 2 and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_eval_writes_what_it_says_resumes_and_does_not_overwrite(tmp_path, capsys, monkeypatch):
    words = ("--problems", 1, "--max-new-tokens", 130, "--languages", "en,sw", "--no-damage", "--out", tmp_path / "run")
    status, out, err = call("eval", capsys, *words)
    assert status == 0 and err == "" and "aten/cpu" in out
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "report.html", "results.json", "samples.jsonl"]
    results = json.loads((run / "results.json").read_text())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 * 5 and results["provider"] == "aten/cpu" and results["schema"] == 1
    for mode in ("original", "fused"):
        for language in ("en", "sw"):
            cell = [s for s in samples if (s["mode"], s["language"]) == (mode, language)]
            assert results["modes"][mode][language]["correct"] == sum(s["correct"] for s in cell)
            assert [s["id"] for s in cell] == [p.id for p in problems("test", 1)]
    assert [(r["mode"], r["language"]) for r in results["paired"]] == [("fused", lang) for lang in ("en", "sw", "all")]
    kept = (run / "samples.jsonl").read_bytes()
    status, _, err = call("eval", capsys, *words)
    assert status == 2 and "already holds a run" in err and (run / "samples.jsonl").read_bytes() == kept
    status, _, err = call("eval", capsys, *words, "--resume", "--strength", 2)
    assert status == 2 and "strength was 1.0, now 2.0" in err
    status, _, err = call("eval", capsys, *words, "--resume", "--mode", "all")
    assert status == 2 and "mode was 'fused', now 'all'" in err and (run / "samples.jsonl").read_bytes() == kept
    # A kill during the last cell: its half-written lines are dropped, the finished cells are not generated again.
    lines = kept.decode().splitlines()
    (run / "samples.jsonl").write_text("\n".join(lines[:17]) + "\n" + lines[17][:40])
    (run / "results.json").unlink()

    asked = []
    real = generate
    monkeypatch.setattr(answering, "generate", lambda m, t, p, **k: asked.append(len(p)) or real(m, t, p, **k))
    assert call("eval", capsys, *words, "--resume")[0] == 0
    assert asked == [5] and (run / "samples.jsonl").read_bytes() == kept
    page = (run / "report.html").read_text()
    assert "<svg" in page and not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


@pytest.mark.slow
def test_controls_and_damage_stand_beside_the_real_subspace_and_go_on_after_a_kill(tmp_path, capsys):
    run = tmp_path / "run"
    words = ("--problems", 2, "--max-new-tokens", 16, "--out", run, "--mode", "hook", "--strength", 2)
    certificate = tmp_path / "c.json"
    small = ("--prompts", 2, "--new-tokens", 1, "--strength", 2)
    assert call("verify", capsys, "--model", "polyglot", "--out", certificate, *small)[0] == 0
    status, out, err = call("eval", capsys, *words, "--controls", "energy:3", "--certificate", certificate)
    assert status == 0 and err == ""
    assert out.startswith("controls: 3 energy x 2 languages x 10 problems, 60 texts to generate, about 1 min")
    assert "3 random subspaces (energy) with the same rank, layers and site, 10 problems per language" in out
    assert "\ndamage, hook: " in out and "damage on 22 neutral sentences per language (test half)" in out
    assert "a linear probe at resid_post still reads the language: lowest accuracy" in out
    assert "leak (share of the part inside" in out
    results = json.loads((run / "results.json").read_text())
    found = results["controls"]
    assert len(found["rows"]) == 6 and set(found["percentiles"]) == {"en", "zh"} and found["mode"] == "hook"
    assert found["real"]["en"]["accuracy"] == results["modes"]["hook"]["en"]["accuracy"]
    assert results["damage_in_words"] in out and next(iter(results)) == "damage_in_words"
    assert set(results["damage"]["neutral"]["hook"]) == {"en", "zh"} and results["certificate"]["faults"] == []
    assert results["power"][0]["comparisons"] == 3 and results["command"].startswith("python -m kernel_surgery.eval")
    assert (run / "report.html").read_text().count("<svg xmlns") == 12  # the panels of five pictures
    # A kill within the controls: the cells that are whole are kept, the one that is not is made again, and alone.
    kept = (run / "controls.jsonl").read_bytes()
    lines = kept.split(b"\n")
    (run / "controls.jsonl").write_bytes(b"\n".join(lines[:47]) + b"\n" + lines[47][:30])
    status, out, _ = call("eval", capsys, *words, "--controls", "energy:3", "--resume", "--no-damage")
    assert status == 0 and out.startswith("controls: 3 energy x 2 languages x 10 problems, 20 texts to generate\n")
    assert (run / "controls.jsonl").read_bytes() == kept
    assert json.loads((run / "results.json").read_text())["controls"]["rows"] == found["rows"]
    # More of them may be asked for later.
    status, out, _ = call("eval", capsys, *words, "--controls", "energy:4", "--resume", "--no-damage")
    assert status == 0 and "80 texts" not in out and "20 texts" in out


@pytest.mark.slow
def test_expag_prints_the_scripts_table(tmp_path, capsys):
    status, out, _ = call("eval", capsys, "--mode", "baked", "--protocol", "expag", "--out", tmp_path / "run")
    assert status == 0
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["expag_metrics"]
    for word, mode in (("baseline", "original"), ("surgery", "baked")):
        for language in ("en", "zh"):
            r = metrics[mode][language]
            assert r["total"] == 20 and sum(r["languages"].values()) == 20
            assert f"{word:>10} | {language.upper()} {r['correct']}/20 FAT={r['mean_fat']:5.1f}" in out
    assert all(f"  L{i}: W_down modified. Norm change: " in out for i in (2, 3, 4, 5))
