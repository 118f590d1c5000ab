"""What runs on a GPU, tested without one: the GPU command, the Triton baselines, the launches and the tuning."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kernel_surgery.common.errors import UserError
from kernel_surgery.ops.eager import project_eager

ROOT = Path(__file__).resolve().parents[2]
BASELINES = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from bench import op, baselines
from kernel_surgery.ops import packed
t = op.inputs(37, 96, 16, torch.float32, torch.device("cpu"))
t["residual"] = t["residual"].clone()
y = baselines.lora(t["x"], packed(t["basis"]), 1.0)
print(op.error_over_bound("project", "lora", y, t))
both = baselines.add_rmsnorm(t["x"], t["residual"], t["weight"], op.EPS)
print(op.error_over_bound("project_add_rmsnorm", "add + rmsnorm, triton", both, t))
"""


@pytest.mark.slow
def test_the_stand_ins_compute_what_they_stand_for():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BASELINES], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(line) for line in done.stdout.split()]
    print(f"error/bound of LoRA's two kernels and of add + rmsnorm, in float32: {ratios}")
    assert len(ratios) == 2 and max(ratios) <= 1


def test_the_gpu_command_without_a_gpu_says_so_and_writes_nothing(tmp_path, monkeypatch):
    from bench import gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the command itself runs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    with pytest.raises(UserError, match="no CUDA device"):
        gpu.run([])
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_gpu_parts_parse_and_their_reserved_time_is_under_nine_minutes(tmp_path):
    from bench import gpu

    parts = gpu.parts(tmp_path)
    names = [part.name for part in gpu.chosen(parts, None)]
    assert names == ["kernels", "memcheck", "racecheck", "models", "op", "model", "profile", "eval"]
    for part in parts:
        words = part.command[part.command.index("-m") + 1 :]
        if words[0] != "pytest":
            importlib.import_module(words[0]).parser().parse_args(words[1:])
    assert sum(part.reserved for part in gpu.chosen(parts, None)) <= gpu.TOTAL <= 9 * 60 - 10
    # By name: in their own order, behind the gate where time is taken, and within the whole.
    for named, run in (
        ("models", ["models"]),
        ("tune", ["kernels", "tune"]),
        ("compiled,kernels", ["kernels", "compiled"]),
        ("profile,memcheck", ["memcheck", "profile"]),
    ):
        found = gpu.chosen(parts, named)
        assert [part.name for part in found] == run and sum(part.reserved for part in found) <= gpu.TOTAL
    with pytest.raises(UserError, match="--parts: 'speed' is not a part; the parts are kernels, memcheck"):
        gpu.chosen(parts, "op,speed")
    assert all(part.reserved <= part.at_most for part in parts)


def gpu_run(out, outcomes=None, absent=(), **changes):
    """(exit status, {part: status}, {part: limit}, log) of a GPU run whose commands are replaced by their outcomes."""
    from bench import gpu

    selected = [
        dataclasses.replace(p, command=[p.name], needs=("a_tool",) if p.name in absent else (), **changes)
        for p in gpu.chosen(gpu.parts(out), None)
    ]
    limits = {}

    def execute(command, limit, log):
        (name,) = command
        limits[name] = limit
        with log.open("a") as file:
            file.write(f"output of {name}\n")
        return (outcomes or {}).get(name, 0)

    status = gpu.run_parts(selected, out, {"device": "A GPU"}, execute)
    assert {f.name for f in out.iterdir()} == {"log.txt", "summary.json"}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    statuses = {name: part["status"] for name, part in summary["parts"].items()}
    return status, statuses, limits, (out / "log.txt").read_text()


def test_the_gpu_command_runs_every_part_and_stores_its_output(tmp_path, capsys):
    status, parts, _, log = gpu_run(tmp_path)
    assert status == 0 and set(parts.values()) == {0} and len(parts) == 8
    said = capsys.readouterr().out
    assert all(f"output of {name}\n" in log and f"{name}: status 0" in said for name in parts)


@pytest.mark.parametrize(
    "broken, stops",
    [({"kernels": 1}, True), ({"memcheck": 9}, True), ({"racecheck": 9}, False), ({"models": 1}, False)],
)
def test_a_wrong_kernel_stops_the_timing_and_a_broken_tool_does_not(tmp_path, broken, stops):
    (name,) = broken
    status, parts, _, _ = gpu_run(tmp_path, broken)
    assert status == 1 and parts[name] == broken[name] and parts["profile"] == parts["eval"] == 0
    assert (parts["op"], parts["model"]) == ((f"not run: {name} failed",) * 2 if stops else (0, 0))


def test_a_gate_that_runs_out_of_time_fails_and_does_not_stop_the_timing(tmp_path):
    status, parts, _, _ = gpu_run(tmp_path, {"kernels": "stopped after 3 s"})
    assert status == 1 and parts["kernels"] == "stopped after 3 s" and parts["op"] == parts["model"] == 0


def test_no_time_is_reserved_for_a_part_whose_tool_is_not_installed(tmp_path):
    from bench import gpu

    status, parts, limits, _ = gpu_run(tmp_path, absent=("model", "eval"))
    assert status == 0 and parts["model"] == parts["eval"] == "not run: a_tool is not installed here"
    every = {part.name: part for part in gpu.parts(tmp_path)}
    reserved = sum(every[name].reserved for name in ("memcheck", "racecheck", "models", "op", "profile"))
    assert limits["kernels"] == pytest.approx(min(every["kernels"].at_most, gpu.TOTAL - reserved), abs=1)
    assert gpu.missing(dataclasses.replace(every["op"], needs=("json", "sh"))) is None


def test_a_part_that_hangs_is_stopped_and_its_output_is_stored(tmp_path, monkeypatch):
    from bench import gpu

    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    hangs = "import subprocess; child = subprocess.Popen(['sleep', '60']); print('child', child.pid); child.wait()"
    began, log = time.monotonic(), tmp_path / "log.txt"
    assert gpu.run_part([sys.executable, "-c", hangs], 2, log) == "stopped after 2 s"
    assert time.monotonic() - began < 30
    (child,) = re.findall(r"^child (\d+)$", log.read_text(), re.MULTILINE)
    state = Path("/proc") / child / "status"  # its child is killed too, which takes a moment
    while state.exists() and "zombie" not in state.read_text():
        assert time.monotonic() - began < 30
        time.sleep(0.05)
    assert gpu.run_part([sys.executable, "-c", "raise SystemExit(3)"], 60, log) == 3


def test_every_kernel_is_launched_once_for_the_sanitizer(monkeypatch):
    from bench import smoke
    from kernel_surgery.kernels import project as kernels

    seen = []

    class Recorded:
        def __init__(self, form):
            self.form = form

        def __getitem__(self, grid):
            return lambda *given, **options: seen.append((self.form, given[0].dtype, options["ADD"], options["NORM"]))

    monkeypatch.setattr(kernels, "KERNELS", {form: Recorded(form) for form in kernels.KERNELS})
    for case in ("awkward", "qwen"):
        for one in smoke.launches(case):
            smoke.launch(*one, "cpu") if one[3] <= 300 else None
    assert {form for form, *_ in seen} == {"row", "tile", "two-pass"}
    every = {(form, kind) for form in ("row", "two-pass") for kind in (torch.bfloat16, torch.float16, torch.float32)}
    assert {(form, kind) for form, kind, *_ in seen} == every | {("tile", torch.bfloat16)}
    assert {(add, norm) for _, _, add, norm in seen} == {(False, False), (True, False), (True, True)}
    with pytest.raises(UserError, match="the kernels run on CUDA only"):
        smoke.run(["--device", "cpu"])


@pytest.mark.slow
def test_tuning_times_what_is_right_and_names_what_is_not(tmp_path, monkeypatch, capsys):
    from bench import baselines, tune
    from kernel_surgery.kernels import project as kernels

    accepted = []

    class Recorded:
        def __init__(self, form):
            self.form = form

        def __getitem__(self, grid):
            return lambda *given, **options: accepted.append((self.form, given[1].stride()))

    real = kernels.project
    monkeypatch.setattr(kernels, "KERNELS", {form: Recorded(form) for form in kernels.KERNELS})

    def emulated(x, basis, strength, residual=None, weight=None, eps=0.0, form=None, **options):
        real(x, basis, strength, residual=residual, weight=weight, eps=eps, form=form, **options)
        if options.get("num_warps") == 16:
            raise RuntimeError("out of resource\nRequired: much")
        h = project_eager(x, basis, strength if options.get("BLOCK_D") != 128 else 0.9)
        if weight is None:
            return h, None
        h = (h.float() + residual.float()).to(x.dtype)
        return h, torch.nn.functional.rms_norm(h, (h.shape[1],), weight, eps)

    def add_rmsnorm(x, residual, weight, eps):
        h = x + residual
        return h, torch.nn.functional.rms_norm(h, (h.shape[1],), weight, eps)

    monkeypatch.setattr(kernels, "project", emulated)
    monkeypatch.setattr(baselines, "add_rmsnorm", add_rmsnorm)
    forms = tuple(tune.TRIED)
    for case in ("project", "project_add_rmsnorm"):
        made = tune.measure(case, 256, torch.device("cpu"), 2, time.monotonic() + 60, forms)
        timed = [row for row in made if not row["left_out"]]
        assert [row["us_p50"] for row in timed] == sorted(row["us_p50"] for row in timed)
        assert [row["of_shipped"] for row in timed if row["form"] == tune.SHIPPED] == [1]
        assert all(row["error_over_bound"] <= 1 for row in timed) and len(timed) > 10
        reasons = {row["left_out"]: row["options"] for row in made[len(timed) :]}
        assert set(reasons) == {"RuntimeError: out of resource", "exceeds its bound"}
        assert "num_warps=16" in reasons["RuntimeError: out of resource"]
        assert "BLOCK_D=128" in reasons["exceeds its bound"]
        assert [row["of_floor"] for row in timed if row["form"] == tune.FLOOR] == [1]
        assert len(made) == 2 + len(list(tune.candidates(256, forms)))
    # Every candidate is one that the launcher takes: all forms, and the row form with the basis either way.
    assert {form for form, _ in accepted} == {"row", "tile", "two-pass"}
    assert ("row", (16, 1)) in accepted and ("row", (1, tune.D)) in accepted
    late = tune.measure("project", 8, torch.device("cpu"), 2, time.monotonic() - 1, forms)
    assert {row["left_out"] for row in late} == {tune.LATE}
    with pytest.raises(UserError, match="no CUDA device here: nothing was run and nothing was written"):
        tune.run(["--out", str(tmp_path / "tune.json")])
    assert not list(tmp_path.iterdir())
