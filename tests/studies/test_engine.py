"""A study whose texts vLLM writes. A stand-in takes its place here; `tests/engines/test_study.py` runs the real one."""

import json

import pytest

from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation import answering
from kernel_surgery.studies.declaring import read_grid
from kernel_surgery.studies.study import frozen_digest
from kernel_surgery.study import run
from tests.support.calls import call, one_thread
from tests.support.engine import NAME, stand_in

GRID = """
mode = "{mode}"
problems = 1
languages = ["en"]
max_new_tokens = 8
device = "cpu"
[grid]
rank = [2]
strength = [1.0, -30.0]
"""
ENGINE = 'engine = "vllm"\ntensor_parallel = 2\nengine_args = {enforce_eager = true}\n'
KEPT = ("dev.jsonl", "test.jsonl", "controls.jsonl", "frozen.json")


def declared(folder, text):
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def texts(out):
    return {name: (out / name).read_bytes() for name in KEPT}


def held(out, name):
    return json.loads((out / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder of the same study whose texts the loaded model writes, and what the command said."""
    folder = tmp_path_factory.mktemp("here")
    with one_thread():
        status, said, _ = call(
            "study", declared(folder, GRID.format(mode="fused")), "--out", folder / "out", "--controls", "haar:2"
        )
    assert status == 0
    return folder / "out", said


def test_the_engine_writes_every_text_and_nothing_that_is_done_is_asked_again(here, tmp_path, monkeypatch):
    starts, out = stand_in(monkeypatch), tmp_path / "out"
    monkeypatch.setattr(answering, "generate", None)  # the loaded model writes nothing
    words = (declared(tmp_path, ENGINE + GRID.format(mode="fused")), "--out", out, "--controls", "haar:2")
    with one_thread():
        status, said, error = call("study", *words)
    assert (status, error) == (0, "")
    asked = [(s["variant"].mode, s["variant"].settings and s["variant"].settings.strength) for s in starts]
    dev, test = (held(out, "study.json")[split] for split in ("dev", "test"))
    chosen = held(out, "frozen.json")["setting"]["strength"]
    assert asked[:3] == [("original", None), ("fused", 1.0), ("fused", -30.0)] and len(dev) == 3 and len(test) == 2
    assert asked[3:] == [("original", None), ("fused", chosen), ("haar:00", 1.0), ("haar:01", 1.0)]
    assert all(s["asked"] == [5] and not s["variant"].adapter for s in starts), "an engine for each setting"
    longest = starts[0]["options"].positions - 8
    assert longest > 8 and all(s["options"].tensor_parallel == 2 for s in starts)
    assert all(s["options"].more == {"enforce_eager": True} for s in starts)
    # The texts are those of the loaded model, and so is everything that is made of them.
    one, other = texts(out), texts(here[0])
    assert all(one[name] == other[name] for name in KEPT[:3])
    assert b'"tokens"' in one["controls.jsonl"] and dev == held(here[0], "study.json")["dev"]
    assert held(out, "study.json")["damage"] == held(here[0], "study.json")["damage"]
    # The outputs say so.
    note = f"{NAME} wrote the texts (fused). The fits and the damage are those of the model that transformers loaded"
    assert held(out, "study.json")["notes"] == [note] and note in said and note not in here[1]
    # Again: nothing is asked of an engine.
    del starts[:]
    assert call("study", *words)[0] == 0 and starts == [] and texts(out) == one
    # A text that is missing is asked again, and nothing else.
    lines = one["dev.jsonl"].splitlines(keepends=True)
    (out / "dev.jsonl").write_bytes(b"".join(lines[:-1]))
    assert call("study", *words)[0] == 0 and texts(out) == one
    assert [(s["variant"].mode, s["variant"].settings.strength) for s in starts] == [("fused", -30.0)]


def test_a_silent_declaration_leaves_no_trace_of_engines(here, tmp_path):
    config, frozen = held(here[0], "config.json"), held(here[0], "frozen.json")
    assert not {"engine", "tensor_parallel", "engine_args"} & config.keys()
    declaration = {name: value for name, value in config.items() if name not in ("resolved_dtype", "weights")}
    assert frozen["sha256"] == frozen_digest(frozen["setting"], declaration)
    # With an engine the hash is another one.
    of_engine = {"engine": "vllm", "tensor_parallel": 1, "engine_args": {}}
    assert frozen["sha256"] != frozen_digest(frozen["setting"], declaration | of_engine)
    assert read_grid(declared(tmp_path, GRID.format(mode="fused")))["engine"] == "transformers"


@pytest.mark.parametrize("mode", ["baked", "lora"])
def test_what_an_engine_loads_is_written_for_each_setting_and_removed(mode, tmp_path, monkeypatch):
    starts, text = stand_in(monkeypatch), ENGINE + GRID.format(mode=mode).replace("[1.0, -30.0]", "[1.0]")
    assert run([str(declared(tmp_path, text)), "--out", str(tmp_path / "out")]) == 0
    assert [s["variant"].mode for s in starts] == ["original", mode] * 2
    for start in (starts[1], starts[3]):
        written = start["variant"].adapter if mode == "lora" else start["variant"].model
        assert start["files"] and not written.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"grid.toml", "out"}


def test_a_folder_belongs_to_one_engine(here, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    (tmp_path / "out").mkdir()
    config = (here[0] / "config.json").read_text()
    (tmp_path / "out" / "config.json").write_text(config)
    words = ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="other settings: engine was 'transformers', now 'vllm'"):
        run([str(declared(tmp_path, ENGINE + GRID.format(mode="fused"))), *words])
    of_engine = {"engine": "vllm", "tensor_parallel": 1, "engine_args": {}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(json.loads(config) | of_engine))
    with pytest.raises(UserError, match="other settings: engine was 'vllm', now 'transformers'"):
        run([str(declared(tmp_path, GRID.format(mode="fused"))), *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('engine = "openai"', "engine is 'openai'; known: transformers, vllm"),
        ('engine = "vllm"\ntensor_parallel = 0', "tensor_parallel is 0, not a whole number of at least 1"),
        ('engine = "vllm"\ntensor_parallel = true', "tensor_parallel is True, not a whole number"),
        ('engine = "vllm"\nengine_args = 3', "engine_args is 3, not a table such as"),
        ('engine = "vllm"\nengine_args = {day = 2026-01-01}', "engine_args cannot be recorded as JSON"),
        ("tensor_parallel = 2", 'tensor_parallel is for engine = "vllm", which is not declared'),
        ("engine_args = {enforce_eager = true}", 'engine_args is for engine = "vllm", which is not declared'),
        ('engine = "vllm"\nmode = "hook"', "mode is 'hook', which vllm does not have; it has baked, fused, lora"),
        ('engine = "vllm"\n[search]\ntrials = 3', r"a \[search\] measures every setting in the loaded model"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_by_name(text, message, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    with pytest.raises(UserError, match=message):
        run([str(declared(tmp_path, text)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("controls", ["energy:2", "pca:2"])
def test_controls_that_need_activations_are_refused(controls, tmp_path, monkeypatch):
    stand_in(monkeypatch)
    words = [str(declared(tmp_path, 'engine = "vllm"')), "--out", str(tmp_path / "out"), "--controls", controls]
    with pytest.raises(UserError, match=f"{controls} cannot be asked of vllm: it gives no activations. Use haar:N"):
        run(words)
    assert not (tmp_path / "out").exists()
