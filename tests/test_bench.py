"""The benchmarks' own honesty: what is timed is checked first, the row is complete, and a wrong provider is shown."""

import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import checkpoint, op, store, timing
from kernel_surgery.common.errors import UserError
from kernel_surgery.ops.eager import project_eager

ROOT = Path(__file__).resolve().parent.parent
ROW = store.FIELDS.keys()


@pytest.mark.slow
def test_the_operators_benchmark_prints_its_ceiling_then_rows_that_are_right(tmp_path, capsys):
    out = tmp_path / "op.json"
    assert op.run(["--quick", "--rounds", "6", "--device", "cpu", "--out", str(out)]) == 0
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
    # Each shape's yardstick is one of those that only move the bytes, and is 1; it stands beside itself as the noise.
    floors = [row for row in rows if row["provider"] == "copy" or row["provider"].startswith("add + rmsnorm")]
    floors = [row for row in floors if row["provider"] == row["floor"]]
    assert floors and {row["of_floor"] for row in floors} == {1} and {row["verdict"] for row in floors} == {"-"}
    assert {row["fraction_of_copy"] for row in rows if row["provider"] == "copy"} == {1}
    assert {row["error_over_bound"] for row in rows if row["provider"] == "copy"} == {0}
    assert all(row["noise"] >= 0 and row["ratio_ci95"][0] <= row["ratio"] <= row["ratio_ci95"][1] for row in rows)


def test_what_cannot_be_run_says_so_and_leaves_the_others_alone(monkeypatch, capsys):
    """As a form that needs more shared memory than a device has: Triton's own error, not a RuntimeError."""

    class OutOfResourcesError(Exception):
        pass

    def failing():
        raise OutOfResourcesError("shared memory, Required: 264000, Hardware limit: 232448\nmore")

    real = op.projections
    monkeypatch.setattr(op, "projections", lambda t, compiled: real(t, compiled) | {"form tile": failing})
    monkeypatch.setattr(op, "CPU_CASES", [(1, 64, 3)])
    assert op.run(["--rounds", "2", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "form tile" in captured.out and "Hardware limit: 232448" in captured.out and "more" not in captured.out
    assert "2 of our own rows could not be run" in captured.err and captured.out.count(" of copy, ") == 8


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


def test_the_parts_of_the_gpu_command_are_ours_and_what_is_kept_for_them_is_under_nine_minutes(tmp_path):
    from bench import gpu

    parts = gpu.parts(tmp_path)
    names = [part.name for part in gpu.chosen(parts, None)]
    assert names == ["kernels", "memcheck", "racecheck", "models", "op", "model", "profile", "eval"]
    for part in parts:
        words = part.command[part.command.index("-m") + 1 :]
        if words[0] != "pytest":
            importlib.import_module(words[0]).parser().parse_args(words[1:])
    assert sum(part.kept for part in gpu.chosen(parts, None)) <= gpu.TOTAL <= 9 * 60 - 10
    # By name: in their own order, behind the gate where time is taken, and within the whole.
    for named, run in (
        ("models", ["models"]),
        ("tune", ["kernels", "tune"]),
        ("compiled,kernels", ["kernels", "compiled"]),
        ("profile,memcheck", ["memcheck", "profile"]),
    ):
        found = gpu.chosen(parts, named)
        assert [part.name for part in found] == run and sum(part.kept for part in found) <= gpu.TOTAL
    with pytest.raises(UserError, match="--parts: 'speed' is no part; there are kernels, memcheck"):
        gpu.chosen(parts, "op,speed")
    assert all(part.kept <= part.at_most for part in parts)


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """run({part: command}) as if there were a GPU: (status, summary's parts, log)."""
    from bench import gpu

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *of: "A GPU")
    real = gpu.parts(tmp_path)

    def run(commands, **limits):
        python = [sys.executable, "-c"]
        made = [dataclasses.replace(p, command=[*python, commands.get(p.name, "")], needs=(), **limits) for p in real]
        monkeypatch.setattr(gpu, "parts", lambda out: made)
        status = gpu.run([])
        (folder,) = tmp_path.iterdir()
        assert folder.name.endswith("-a-gpu") and {f.name for f in folder.iterdir()} == {"log.txt", "summary.json"}
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return status, {k: p["status"] for k, p in summary["parts"].items()}, (folder / "log.txt").read_text()

    return run


def test_the_gpu_command_runs_every_part_and_keeps_what_each_said(pretended, capsys):
    status, parts, log = pretended({"op": "print('a table')"})
    assert status == 0 and set(parts.values()) == {0} and len(parts) == 8
    assert "\na table\n" in log and "op: status 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken, stops",
    [({"kernels": 1}, True), ({"memcheck": 9}, True), ({"racecheck": 9}, False), ({"models": 1}, False)],
)
def test_nothing_is_timed_where_a_kernel_is_wrong_and_a_tool_that_breaks_stops_nothing(pretended, broken, stops):
    (name,) = broken
    status, parts, _ = pretended({part: f"raise SystemExit({code})" for part, code in broken.items()})
    assert status == 1 and parts[name] == broken[name] and parts["profile"] == parts["eval"] == 0
    assert (parts["op"], parts["model"]) == ((f"not run: {name} is red",) * 2 if stops else (0, 0))


def test_a_gate_that_ran_out_of_time_has_shown_nothing_and_stops_nothing(pretended):
    status, parts, _ = pretended({"kernels": "import time; time.sleep(60)"}, at_most=3)
    assert status == 1 and parts["kernels"] == "stopped after 3 s" and parts["op"] == parts["model"] == 0


def test_what_is_not_installed_is_known_before_anything_runs_and_nothing_is_kept_for_it(pretended, monkeypatch):
    from bench import gpu

    monkeypatch.setattr(gpu, "missing", lambda part: "a_tool" if part.name in ("model", "eval") else None)
    limits = []
    monkeypatch.setattr(gpu, "run_part", lambda command, limit, log: limits.append(limit) or 0)
    status, parts, _ = pretended({})
    assert status == 0 and parts["model"] == parts["eval"] == "not run: a_tool is not installed here"
    every = {part.name: part for part in gpu.parts(None)}
    kept = sum(every[name].kept for name in ("memcheck", "racecheck", "models", "op", "profile"))
    assert limits[0] == pytest.approx(min(every["kernels"].at_most, gpu.TOTAL - kept), abs=1)


def test_a_part_that_hangs_is_stopped_and_what_it_said_is_kept(pretended):
    hangs = "import subprocess; child = subprocess.Popen(['sleep', '60']); print('child', child.pid); child.wait()"
    began = time.monotonic()
    status, parts, log = pretended({"op": hangs}, at_most=3)
    assert status == 1 and parts["op"] == "stopped after 3 s" and parts["model"] == 0
    assert time.monotonic() - began < 30
    (child,) = re.findall(r"^child (\d+)$", log, re.MULTILINE)
    state = Path("/proc") / child / "status"  # what it had started is gone too, or about to be collected
    assert not state.exists() or "zombie" in state.read_text()


def test_a_part_whose_tool_is_not_there_is_named_and_is_no_failure(tmp_path, monkeypatch):
    from bench import gpu

    part = gpu.parts(tmp_path)[0]
    assert gpu.missing(dataclasses.replace(part, needs=("json", "sh"))) is None
    assert gpu.missing(dataclasses.replace(part, needs=("json", "no_such_tool"))) == "no_such_tool"


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


def test_tuning_times_what_is_right_and_names_what_is_not(tmp_path, monkeypatch, capsys):
    from bench import tune
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

    monkeypatch.setattr(kernels, "project", emulated)
    for case in ("project", "project_add_rmsnorm"):
        made = tune.measure(case, 64, torch.device("cpu"), 2, time.monotonic() + 60)
        timed = [row for row in made if not row["left_out"]]
        assert [row["us_p50"] for row in timed] == sorted(row["us_p50"] for row in timed)
        assert [row["of_shipped"] for row in timed if row["form"] == tune.SHIPPED] == [1]
        assert all(row["error_over_bound"] <= 1 for row in timed) and len(timed) > 10
        reasons = {row["left_out"]: row["options"] for row in made[len(timed) :]}
        assert set(reasons) == {"RuntimeError: out of resource", "breaks its bound"}
        assert "num_warps=16" in reasons["RuntimeError: out of resource"]
        assert "BLOCK_D=128" in reasons["breaks its bound"]
        assert len(made) == 1 + len(list(tune.candidates(64)))
    # Every candidate is one that the launcher takes: all forms, and the row form with the basis either way.
    assert {form for form, _ in accepted} == {"row", "tile", "two-pass"}
    assert ("row", (16, 1)) in accepted and ("row", (1, tune.D)) in accepted
    late = tune.measure("project", 8, torch.device("cpu"), 2, time.monotonic() - 1)
    assert {row["left_out"] for row in late} == {tune.LATE}
    with pytest.raises(UserError, match="no CUDA device here: nothing was run and nothing was written"):
        tune.run(["--out", str(tmp_path / "tune.json")])
    assert not list(tmp_path.iterdir())


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
    assert list(rows) == [checkpoint.COPY, checkpoint.HASHED, "bake", checkpoint.DENSE, checkpoint.PEFT]
    said = capsys.readouterr().out
    assert list(work.iterdir()) == [] and said.index("hashing as many bytes") < said.index("wrongly rounded")
    assert json.loads(said.splitlines()[-1])["case"] == "checkpoint"
    assert rows[checkpoint.HASHED]["ratio"] == 1 and rows[checkpoint.COPY]["fraction_of_copy"] == 1
    for name in ("bake", checkpoint.PEFT):
        assert rows[name]["leak_over_floor"] <= 1.1 and rows[name]["error_over_bound"] <= 1
        assert rows[name]["not_correctly_rounded"] < 0.01
    assert rows[checkpoint.DENSE]["error_over_bound"] > 1 and rows[checkpoint.DENSE]["not_correctly_rounded"] > 0.1
    assert rows["bake"]["generated_tokens"] == 8
    assert rows["bake"]["peak_anonymous_gb"] > 0 and rows["bake"]["peft"]


def test_every_benchmark_is_listed_and_can_be_run_by_name(capsys):
    from bench import __main__ as every

    files = {p.stem for p in (ROOT / "bench").glob("*.py")}
    helpers = {"__init__", "__main__", "parsing", "store", "timing", "shapes", "methods", "baselines"}
    helpers |= {"tables", "plots"}
    assert set(every.BENCHES) == files - helpers
    assert every.run([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in every.BENCHES)
    for name in every.BENCHES:
        with pytest.raises(SystemExit) as left:
            every.run([name, "--help"])
        assert left.value.code == 0 and f"python -m bench.{name}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no benchmark 'speed'; there are opcount, op"):
        every.run(["speed"])


def test_a_ratio_is_called_slower_only_beyond_the_noise():
    rng = np.random.default_rng(0)
    base = 100 + rng.normal(0, 1, 40)
    times = {"original": base, timing.NOISE: base * rng.normal(1, 0.03, 40)}
    times |= {"a little": base * rng.normal(1.005, 0.03, 40), "twice": base * 2, "half": base / 2}
    found = timing.against(times)
    words = {name: row["verdict"] for name, row in found.items()}
    assert words == {
        **{"original": "-", timing.NOISE: "-", "a little": "within the noise", "twice": "slower", "half": "faster"}
    }
    assert 0 < found["twice"]["noise"] < 0.1 and found["twice"]["ratio"] == pytest.approx(2)
    # Apart from 1 and yet no further than the original's own repetition: neither word.
    wide = {"original": [100.0] * 7, timing.NOISE: [96.0, 97, 98, 100, 102, 103, 104]}
    small = timing.against(wide | {"a bit": [103.0] * 7, "much": [120.0] * 7})
    assert small["a bit"]["verdict"] == "undecided" and small["much"]["verdict"] == "slower"
    # An overhead as large as `detectable`, with an interval like the others', is called slower; one below it is not.
    assert small["a bit"]["detectable"] == pytest.approx(small["a bit"]["noise"])
    for more, word in ((0.01, "slower"), (-0.01, "undecided")):
        at = 1 + small["a bit"]["detectable"] + more
        assert timing.against(wide | {"a bit": [103.0] * 7, "x": [100 * at] * 7})["x"]["verdict"] == word
    few = timing.ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert few["ratio_ci95"] is None and few["ratio_range"] == [2.0, 4.0] and timing.ends(few) == (2.0, 4.0)


@pytest.mark.parametrize("rounds", [6, 8, 12, 20])
def test_the_interval_of_a_ratio_is_the_narrowest_by_order_statistics_that_holds_95_times_in_100(rounds):
    """Counted from the binomial law: the median lies below the r-th smallest of n ratios where fewer than r do."""
    below = np.cumsum([math.comb(rounds, i) for i in range(rounds + 1)]) / 2**rounds
    r = int((below <= 0.025).sum())
    sample = np.random.default_rng(0).permutation(np.arange(1.0, rounds + 1))
    found = timing.ratio(sample * 2, np.full(rounds, 2.0))
    assert found["ratio_ci95"] == [r, rounds + 1 - r] and found["ratio_range"] == [1, rounds]
    assert found["ratio"] == (rounds + 1) / 2
    assert timing.ratio(sample[:5], np.ones(5))["ratio_ci95"] is None


def test_rounds_take_every_provider_once_and_the_first_is_thrown_away():
    seen, clock = [], iter(range(1000))

    def call(name):
        seen.append(name)
        return float(next(clock))

    times = timing.interleaved({name: lambda name=name: call(name) for name in "abc"}, 5)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 6 and all(sorted(r) == list("abc") for r in rounds) and len(set(map(tuple, rounds))) > 1
    assert {len(t) for t in times.values()} == {5} and min(map(min, times.values())) == 3


@pytest.fixture(scope="module")
def small():
    """(model, bases, oracle) with four layers, two of them edited."""
    from bench import model, opcount, shapes

    made = shapes.random_model(torch.float32, "cpu", **opcount.SMALL, num_hidden_layers=4, vocab_size=64)
    bases = shapes.random_bases(made)
    return made, bases, model.Oracle(made, bases, tokens=16)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_provider_computes_the_edit_and_an_unedited_one_is_not_timed(small, phase):
    from bench import methods, model

    made, bases, oracle = small
    names = [name for name in methods.NAMES if name not in methods.missing(made.dtype)]
    with methods.opened(made, bases, names) as calls:
        calls["nothing"] = calls["original"]
        rows = model.measure(calls, oracle, (phase, 2, 16), "eager", 2, 10.0)
    found = {row["provider"]: row for row in rows}
    assert list(found) == [*names, "nothing"] and methods.missing() == {}
    for name, row in found.items():
        print(f"{phase} {name}: error/bound {row['error_over_bound']:.2f}")
        assert (row["error_over_bound"] <= 1) == (row["left_out"] is None) == (name != "nothing")
        assert row["left_out"] is None or row["left_out"] == "its logits break their bound" in model.shown(row)
    # Sharing weights is not sharing edits: the model itself is as it was.
    ids = model.prompts(made, 2, 16)
    exact = oracle.logits(ids)["original"]
    assert oracle.error_over_bound("original", model.last_logits(made, ids)[:, -1], {"original": exact}) <= 1


@pytest.mark.slow
def test_compiled_providers_do_not_run_each_others_graphs(small, monkeypatch):
    """Dynamo keeps graphs by code object and does not look at hooks: steps that share one run the last one's graph."""
    from bench import methods, model

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="aot_eager", **options))
    made, bases, oracle = small
    names = [name for name in methods.NAMES if name not in methods.PEERS]
    with methods.opened(made, bases, names) as calls:
        rows = model.measure(calls, oracle, ("prefill", 1, 8), "compile", 1, 10.0)
        assert {row["provider"]: row["left_out"] for row in rows} == dict.fromkeys(names)
        assert {row["provider"]: row["graph_breaks"] for row in rows} == dict.fromkeys(names, 0)
        few = {name: calls[name] for name in ("original", timing.NOISE, "hook", "fused")}
        # Compiled and then captured: what is captured is the compiled function (a stand-in for CUDA's capture here).
        captured = []
        monkeypatch.setattr(model, "graphed", lambda run, before: captured.append(run) or run)
        rows = model.measure(few, oracle, ("prefill", 1, 8), "compile+graph", 1, 10.0)
        assert [(row["left_out"], row["graph"], row["graph_breaks"]) for row in rows] == [(None, True, 0)] * 4
        assert len(captured) == 4 and all(hasattr(run, "_torchdynamo_orig_callable") for run in captured)
        # The check can fail: one function for all.
        monkeypatch.setattr(model, "prepared", lambda name, step, how: torch.compile(step, dynamic=False))
        rows = model.measure(few, oracle, ("prefill", 1, 8), "compile", 1, 10.0)
        assert "its logits break their bound" in [row["left_out"] for row in rows]
    torch._dynamo.reset()


def test_the_status_is_1_where_a_mode_of_ours_was_not_timed_and_0_where_it_is_exact(small, monkeypatch):
    from bench import model

    made, bases, oracle = small
    monkeypatch.setattr(model, "load", lambda *args: (made, bases))
    monkeypatch.setattr(model, "Oracle", lambda *args: oracle)
    for left_out, provider, status in ((None, "fused", 0), ("breaks", "fused", 1), ("breaks", "addmm hook", 0)):
        row = {"provider": provider, "left_out": left_out, "error_over_bound": 0.0, "launches": None, "us_p50": 1.0}
        row |= {"us_added": 0.0, "graph_breaks": None, "goal_met": None, "detectable": 0.01, "run": "1"}
        row |= {"ratio": 1.0, "ratio_ci95": None, "ratio_range": [1.0, 1.0], "verdict": "-"}
        monkeypatch.setattr(model, "measure", lambda *args, row=row: [row])
        assert model.run(["--case", "layer", "--device", "cpu", "--methods", "hook"]) == status


def test_the_goal_is_met_only_where_the_whole_interval_meets_it():
    from bench import model

    for ends, met in (((0.99, 1.01), True), ((0.99, 1.0102), False), ((1.0, 1.0), True)):
        assert model.goal_met({"ratio_ci95": ends, "ratio_range": (0.5, 2)}) == met
    assert not model.goal_met({"ratio_ci95": None, "ratio_range": (0.9, 1.2)})


def test_a_captured_step_runs_the_attention_that_is_run_without(small, monkeypatch):
    """transformers builds another mask, and repeats the heads, where it sees a graph being captured."""
    from bench import methods, model

    made, _, _ = small
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape, k.shape, None if attn_mask is None else attn_mask.shape, options))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = model.prompts(made, 2, 16)
    with methods.opened(made, {}, ["original"]) as calls:
        for phase in ("prefill", "decode"):
            step = model.Step(calls["original"], phase, ids, room=8)
            found = []
            for capturing in (False, True):
                monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
                seen.clear()
                found.append(step())
                found.append(list(seen))
                step.rewind()
            eager, ran, captured, ran_captured = found
            assert torch.equal(eager, captured) and ran == ran_captured and len(ran) == 4
            assert (ran[0][2] is None) == ran[0][3]["is_causal"] == (phase == "prefill")


def test_a_way_that_is_not_there_is_refused_and_what_cannot_be_captured_says_so(small, monkeypatch):
    from bench import methods, model

    for words in (["--how", "graph", "--device", "cpu"], ["--how", "nonsense", "--device", "cpu"]):
        with pytest.raises(UserError, match=r"it takes eager, compile and, on CUDA, graph and compile\+graph"):
            model.run(words)
    with pytest.raises(UserError, match=r"--only 'decode:2:1': layer has prefill:1:128, decode:1:128\. Nothing"):
        model.run(["--case", "layer", "--device", "cpu", "--only", "decode:2:1"])
    made, bases, oracle = small

    def failing(name, step, how):
        raise ValueError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(model, "prepared", failing)
    with methods.opened(made, bases, ["original", timing.NOISE, "hook"]) as calls:
        rows = model.measure(calls, oracle, ("prefill", 1, 8), "graph", 1, 10.0)
    assert {row["left_out"] for row in rows} == {"graph: ValueError: operation not permitted when stream is capturing"}
    assert "not permitted" in model.shown(rows[0])


@pytest.mark.slow
def test_the_fit_benchmark_runs_and_tells_a_rough_subspace(tmp_path, capsys):
    from bench import fit

    out = tmp_path / "rows.json"
    assert fit.run(["--layers", "2", "--d", "256", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    assert rows[fit.OURS]["exact"] and rows[fit.OURS]["sine"] <= fit.ANGLE < rows[fit.TOP[0]]["sine"]
    assert rows[fit.SCRIPT]["speedup"] == 1 and "times the script's speed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_evaluation_benchmark_compares_texts_before_times(tmp_path, capsys, monkeypatch):
    from bench import evaluation

    words = ["--problems", "1", "--languages", "en", "--rounds", "1", "--out", str(tmp_path / "rows.json")]
    assert evaluation.run(words) == 0
    said = capsys.readouterr().out
    assert said.count("5 texts, 5 the same as alone, 0 parted by rounding") == 2 and "times the loop's speed" in said
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["batch"] for row in rows] == [1, 64, 64] and len({row["tokens"] for row in rows}) == 1
    real = evaluation.batched

    def other(*args):
        return [(ids[0] + 1, *ids[1:]) for ids in real(*args)]

    monkeypatch.setattr(evaluation, "batched", other)
    assert evaluation.run(words) == 1 and "other text than alone" in capsys.readouterr().out


def test_slopes_are_those_of_the_work():
    from bench import growth

    assert growth.slope((1, 2, 4, 8), (3, 6, 12, 24))[0] == pytest.approx(1)
    assert growth.slope((1, 2, 4, 8), (3, 12, 48, 192))[0] == pytest.approx(2)
    # The interval holds the slope that noisy times were made with 95 times in 100.
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        times = [s**1.5 * math.exp(rng.normal(0, 0.1)) for s in (1, 2, 4, 8)]
        rate, half = growth.slope((1, 2, 4, 8), times)
        held += abs(rate - 1.5) <= half
    assert 0.92 <= held / 400 <= 0.98
    assert growth.as_expected("tokens", 1.1, 0.11) and not growth.as_expected("tokens", 1.1, 0.09)
    assert growth.as_expected("k", 0.5, 0.0) and not growth.as_expected("k", -0.2, 0.1)
    held = growth.peak_of(lambda: [torch.ones(2**24), time.sleep(0.05)])
    assert 0.9 * 2**26 < held < 1.5 * 2**26


@pytest.mark.slow
def test_the_growth_benchmark_prints_a_slope_for_every_quantity(capsys, monkeypatch, tmp_path):
    from bench import growth

    monkeypatch.setattr(growth, "SIZES", {name: sizes[:3] for name, sizes in growth.SIZES.items()})
    assert growth.run(["--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out
    for what in growth.EXPECTED:
        assert len([row for row in rows if row["case"] == what]) == 3
        assert said.index(f"{what:<11} expected slope") < said.index(
            "slope", said.index(f"{what:<11} expected slope") + 40
        )
