"""Threads are chosen by the size of the model, and the user's own choice stands."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kernel_surgery.models.threads import ONE_THREAD_BELOW, choose_threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def folder_of(tmp_path, d):
    config = {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": d}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_small_model_runs_on_one_thread(two_threads, tmp_path):
    choose_threads(folder_of(tmp_path, ONE_THREAD_BELOW))
    choose_threads("Org/on-the-hub")
    choose_threads(str(tmp_path / "missing"))
    assert torch.get_num_threads() == 2
    choose_threads(folder_of(tmp_path, ONE_THREAD_BELOW - 1))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    choose_threads("polyglot")
    assert torch.get_num_threads() == 1


def test_the_users_number_of_threads_stands(two_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    choose_threads("polyglot")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("command", ["collect", "eval", "verify", "study"])
def test_every_command_that_runs_a_model_chooses(command, two_threads, tmp_path, monkeypatch):
    """The model is chosen before it is loaded: loading is made to fail here."""
    import importlib

    from kernel_surgery.models import before, layerwise

    class Loaded(Exception):
        pass

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(before, "load_model", load)
    monkeypatch.setattr(layerwise.Layerwise, "__init__", load)
    grid = tmp_path / "grid.toml"
    grid.write_text("problems = 1\n[grid]\nrank = [1]\n")
    words = {
        "collect": ["--out", str(tmp_path / "a.safetensors"), "--problems", "1"],
        "eval": ["--problems", "1", "--out", str(tmp_path / "run")],
        "verify": ["--model", "polyglot", "--prompts", "1"],
        "study": [str(grid), "--out", str(tmp_path / "study")],
    }[command]
    with pytest.raises(Loaded):
        importlib.import_module(f"kernel_surgery.{command}").run(words)
    assert torch.get_num_threads() == 1


def test_waiting_threads_sleep():
    """Set before torch is imported, which reads it once. A user's own policy stands."""
    code = "import os, sys\nfrom kernel_surgery.common.command import main\n"
    code += "main(lambda argv: print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY']), [])"
    for set_before, expected in ((None, "passive"), ("active", "active")):
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        env |= {"OMP_WAIT_POLICY": set_before} if set_before else {}
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert said.stdout.split() == ["False", expected]
