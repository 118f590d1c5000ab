"""What runs on a GPU, tested without one: the GPU command, the Triton baselines, the launches and the tuning."""

import ast
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


def test_the_gpu_parts_collect_every_gpu_test_and_only_files_that_import_on_the_device(tmp_path):
    """Files beside them may import what only another machine has: nbclient, optuna or zensical, say."""
    from bench import gpu

    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("*.py")
        if any("mark" in (word := ast.unparse(node)) and "gpu" in word.split(".") for node in decorators(file))
    }
    found = {gpu.KERNEL_TESTS, *gpu.gpu_tests()}
    assert found == marked and len(found) > 3
    every = {p.name: p.command for p in gpu.parts(tmp_path)}
    collected = {word for name in ("kernels", "models") for word in every[name] if word.startswith("tests/")}
    assert collected == found
    # What they import at their heads, and what those import of ours, is there.
    done, todo = set(), [ROOT / name for name in found] + list(ROOT.glob("tests/**/conftest.py"))
    foreign = set()
    while todo:
        file = todo.pop()
        if file in done or not file.is_file():
            continue
        done.add(file)
        for name in heads(file):
            top, path = name.split(".")[0], ROOT.joinpath(*name.split("."))
            if top in ("bench", "kernel_surgery", "tests"):
                todo += [path.with_suffix(".py"), path / "__init__.py"]
            elif top not in sys.stdlib_module_names:
                foreign.add(top)
    assert foreign <= ON_THE_DEVICE, foreign - ON_THE_DEVICE
    assert "torch" in foreign
    # Without the choice of files, others would be imported that do not suit.
    others = {name.split(".")[0] for file in ROOT.glob("tests/**/test_*.py") for name in heads(file)}
    assert others - ON_THE_DEVICE - {"bench", "kernel_surgery", "tests"} - set(sys.stdlib_module_names)


# What tests may import at their heads there: the packages that the machine with the GPU has.
ON_THE_DEVICE = {
    *("torch", "triton", "transformers", "numpy", "einops", "safetensors", "tokenizers", "scipy", "tqdm"),
    *("pytest", "hypothesis", "matplotlib", "peft", "accelerate", "packaging"),
}


def decorators(file):
    """The decorators in a source, and what is given to `pytestmark`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        yield from getattr(node, "decorator_list", ())
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            yield node.value


def heads(file):
    """The full names of what a source imports outside of functions."""
    todo = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef) and ast.unparse(getattr(node, "test", node)) != "TYPE_CHECKING":
            todo += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]


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


def test_every_candidate_with_two_blocks_is_compiled_and_timed_by_tune():
    from bench import tune
    from kernel_surgery.ops.compiled import CANDIDATES

    shapes = [*((rows, tune.D, tune.K) for rows in tune.ROWS), *tune.OTHERS]
    todo = tune.tasks(shapes, tuple(tune.TRIED))
    names = [tune.kernel(case, shape, key) for case, shape, _, key in todo]
    assert len(names) == len(set(names))  # no kernel is compiled twice
    timed = {(case, *shape[:1], *shape[1:], key) for case, shape, _, key in todo}
    for one in CANDIDATES:
        rows, d, k = one.shape
        for operation in set(one.operations) & set(tune.CASES):
            key = one.form, "packed", tune.as_text(one.options)
            padded = {(case, m, width, -(-rank // 16) * 16, name) for case, m, width, rank, name in timed}
            assert (operation, rows, d, k, key) in padded
    # What ships comes first for each shape: everything else is compared with it.
    assert todo[0][3][0] == tune.SHIPPED
    assert {shape for _, shape, _, key in todo if key[0] == tune.SHIPPED} == set(shapes)


@pytest.mark.slow
def test_kernels_that_take_too_long_to_compile_are_given_up():
    from bench import tune

    began = time.monotonic()
    done = tune.warm_all(2, [0.0, 600.0, 0.01, 600.0, 600.0], began + 5, work=time.sleep)
    assert len(done) == 2 and time.monotonic() - began < 15
    assert len(tune.warm_all(2, [0.0, 0.01], began + 60, work=time.sleep)) == 2
    # All that tune does ends before its part is stopped: compiling, then timing until --seconds.
    from bench.gpu import parts

    part = next(part for part in parts(ROOT) if part.name == "tune")
    seconds = tune.parser().parse_args(part.command[part.command.index("bench.tune") + 1 :]).seconds
    assert 0 < tune.FOR_COMPILING < 1 and seconds + 30 <= part.at_most


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
        made = tune.measure(case, (256, tune.D, tune.K), torch.device("cpu"), 2, time.monotonic() + 60, forms)
        timed = [row for row in made if not row["left_out"]]
        assert [row["us_p50"] for row in timed] == sorted(row["us_p50"] for row in timed)
        assert [row["of_shipped"] for row in timed if row["form"] == tune.SHIPPED] == [1]
        assert all(row["error_over_bound"] <= 1 for row in timed) and len(timed) > 10
        reasons = {row["left_out"]: row["options"] for row in made[len(timed) :]}
        assert set(reasons) == {"RuntimeError: out of resource", "exceeds its bound"}
        assert "num_warps=16" in reasons["RuntimeError: out of resource"]
        assert "BLOCK_D=128" in reasons["exceeds its bound"]
        assert [row["of_floor"] for row in timed if row["form"] == tune.FLOOR] == [1]
        assert len(made) == 2 + len(list(tune.candidates(case, (256, tune.D, tune.K), forms)))
        assert any("PREPARED=True" in row["options"] for row in timed)
    # Every candidate is one that the launcher takes: all forms, and the row form with the basis either way.
    assert {form for form, _ in accepted} == {"row", "tile", "two-pass"}
    assert ("row", (16, 1)) in accepted and ("row", (1, tune.D)) in accepted
    shape, device = (8, tune.D, tune.K), torch.device("cpu")
    late = tune.measure("project", shape, device, 2, time.monotonic() - 1, forms)
    assert {row["left_out"] for row in late} == {tune.LATE}
    # What is not compiled in time is named, and only what ships is compiled while timing.
    one = next(task for task in tune.tasks([shape], forms) if task[3][0] == "row")
    compiled = {tune.kernel(*one[:2], one[3])}
    made = tune.measure("project", shape, device, 2, time.monotonic() + 60, forms, compiled)
    assert sorted(r["form"] for r in made if not r["left_out"]) == ["as shipped", "floor", "row"]
    assert {r["left_out"] for r in made} == {None, tune.NOT_COMPILED}
    with pytest.raises(UserError, match="no CUDA device here: nothing was run and nothing was written"):
        tune.run(["--out", str(tmp_path / "tune.json")])
    assert not list(tmp_path.iterdir())
