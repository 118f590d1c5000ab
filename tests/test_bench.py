"""The benchmarks' own honesty: what is timed is checked first, the row is complete, and a wrong provider is shown."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import checkpoint, op

ROOT = Path(__file__).resolve().parent.parent
ROW = {
    *("case", "provider", "device", "M", "d", "k", "dtype", "us_p20", "us_p50", "us_p80", "gbps", "fraction_of_copy"),
    *("error_over_bound", "launches", "cache", "graph", "torch", "triton", "commit", "dirty", "date"),
}


@pytest.mark.slow
def test_the_operators_benchmark_prints_its_ceiling_then_rows_that_are_right(tmp_path, capsys):
    out = tmp_path / "op.json"
    assert op.run(["--quick", "--rounds", "3", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.index("a large copy moves") < said.index("eager") and json.loads(said.splitlines()[-1])["rows"] > 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["case"] for row in rows} == {"project", "project_add_rmsnorm"}
    for row in rows:
        assert row.keys() >= ROW and row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["cache"] == "warm" and row["graph"] is False and row["launches"] is None  # a CPU
        if not row["provider"].startswith("addmm"):
            assert row["error_over_bound"] <= 1
    # What serving kernels do breaks the bound in bfloat16, and the table says so instead of leaving it out.
    low = [row for row in rows if row["provider"].startswith("addmm") and row["dtype"] == "bfloat16"]
    assert low and all(row["error_over_bound"] > 1 for row in low)
    assert said.count("breaks its bound") == len(low)
    # The yardstick of a shape is its fastest: nothing without an edit is faster than 1.
    floors = [row for row in rows if row["provider"] == "copy" or row["provider"].startswith("add + rmsnorm")]
    assert floors and max(row["fraction_of_copy"] for row in floors) == 1


def test_a_wrong_provider_of_ours_fails_the_benchmark(monkeypatch, capsys):
    real = op.projections

    def wrong(t, compiled):
        return {name: call for name, call in real(t, compiled).items() if name == "copy"} | {
            "project (wrong)": lambda: t["x"].clone()
        }

    monkeypatch.setattr(op, "projections", wrong)
    monkeypatch.setattr(op, "CPU_CASES", [(1, 64, 3)])
    assert op.run(["--rounds", "1", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "2 of our own rows break their bound" in captured.err and "breaks its bound" in captured.out


def test_the_checks_tell_an_edit_from_none():
    t = op.inputs(5, 64, 3, torch.float32, torch.device("cpu"))
    plain = op.add_rmsnorm(t["x"], t["residual"], t["weight"], op.EPS)
    assert op.error_over_bound("project_add_rmsnorm", "add + rmsnorm, eager", plain, t) <= 1
    assert op.error_over_bound("project_add_rmsnorm", "project_add_rmsnorm", plain, t) > 1
    h, n = op.additions(t, False)["project_add_rmsnorm (aten/cpu)"]()
    assert op.error_over_bound("project_add_rmsnorm", "project_add_rmsnorm", (h, n), t) <= 1
    assert op.error_over_bound("project_add_rmsnorm", "project_add_rmsnorm", (h, n * 1.01), t) > 1
    # The last rows are looked at too, and those between.
    t = op.inputs(2000, 64, 3, torch.float32, torch.device("cpu"))
    for wrong in (slice(1999, None), slice(900, 1100)):
        y = op.projections(t, False)["project (aten/cpu)"]()
        assert op.error_over_bound("project", "project", y, t) <= 1
        y[wrong] = 0
        assert op.error_over_bound("project", "project", y, t) > 1


STAND_INS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from bench import op, stand_ins
from kernel_surgery.ops import packed
t = op.inputs(37, 96, 16, torch.float32, torch.device("cpu"))
t["residual"] = t["residual"].clone()
y = stand_ins.lora(t["x"], packed(t["basis"]), 1.0)
print(op.error_over_bound("project", "lora", y, t))
both = stand_ins.add_rmsnorm(t["x"], t["residual"], t["weight"], op.EPS)
print(op.error_over_bound("project_add_rmsnorm", "add + rmsnorm, triton", both, t))
"""


@pytest.mark.slow
def test_the_stand_ins_compute_what_they_stand_for():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STAND_INS], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(line) for line in done.stdout.split()]
    print(f"error/bound of LoRA's two kernels and of add + rmsnorm, in float32: {ratios}")
    assert len(ratios) == 2 and max(ratios) <= 1


def test_the_gpu_command_without_a_gpu_says_so_and_writes_nothing(tmp_path, monkeypatch):
    from bench import gpu
    from kernel_surgery import cli

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the command itself runs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    with pytest.raises(cli.UserError, match="no CUDA device"):
        gpu.run([])
    assert not (tmp_path / "out").exists()


def test_every_part_of_the_gpu_command_has_a_limit_and_together_they_stay_under_nine_minutes(tmp_path):
    from bench import gpu

    parts = gpu.parts(tmp_path)
    assert [name for name, _, _ in parts] == ["tests", "op", "eval"]
    assert sum(limit for _, limit, _ in parts) <= 9 * 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_checkpoint_benchmark_runs_beside_both_peers(tmp_path, capsys, monkeypatch):
    """At a small size: what is timed is checked from the files, and the first script's way is shown to be coarse."""
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(checkpoint, "QWEN", checkpoint.QWEN | small | {"vocab_size": 512})
    out, work = tmp_path / "rows.json", tmp_path / "work"
    work.mkdir()
    words = ["--layers", "4", "--rounds", "1", "--peers", "--out", str(out), "--folder", str(work)]
    assert checkpoint.run(words) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    assert list(rows) == [checkpoint.FLOOR, "bake", checkpoint.DENSE, checkpoint.PEFT]
    assert list(work.iterdir()) == [] and "of floor" in capsys.readouterr().out
    for name in ("bake", checkpoint.PEFT):
        assert rows[name]["leak_over_floor"] <= 1.1 and rows[name]["error_over_bound"] <= 1
        assert rows[name]["not_correctly_rounded"] < 0.01
    assert rows[checkpoint.DENSE]["error_over_bound"] > 1 and rows[checkpoint.DENSE]["not_correctly_rounded"] > 0.1
    assert rows["bake"]["generated_tokens"] == 8
    assert rows["bake"]["peak_anonymous_gb"] > 0 and rows["bake"]["peft"]
