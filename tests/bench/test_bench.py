"""The benchmarks check what they time: every row is complete, and a wrong method is reported."""

import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import checkpoint, op, store, timing
from kernel_surgery.common.errors import UserError
from tests.support.calls import call

ROOT = Path(__file__).resolve().parents[2]


ROW = store.FIELDS.keys()


@pytest.mark.slow
def test_the_operators_benchmark_prints_its_ceiling_then_rows_that_are_right(tmp_path, capsys, monkeypatch):
    out = tmp_path / "op.json"
    # The width and the rank that are measured, and fewer rows: their times are not looked at here.
    monkeypatch.setattr(op, "CPU_CASES", [(1, 2048, 10), (2, 2048, 10), (64, 2048, 10)])
    assert op.run(["--quick", "--rounds", "6", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.index("a large copy moves") < said.index("eager") and json.loads(said.splitlines()[-1])["rows"] > 0
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["case"] for row in rows} == {"project", "project_add_rmsnorm"}
    assert {row["M"] for row in rows} == {1, 64}  # --quick: the first case and the last
    for row in rows:
        assert row.keys() >= ROW and row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["cache"] == "warm" and row["graph"] is False and row["launches"] is None  # a CPU
        if not row["provider"].startswith("addmm"):
            assert row["error_over_bound"] <= 1
    # What serving kernels do breaks the bound in bfloat16, and the table says so instead of leaving it out.
    low = [row for row in rows if row["provider"].startswith("addmm") and row["dtype"] == "bfloat16"]
    assert low and all(row["error_over_bound"] > 1 for row in low)
    assert said.count("exceeds its bound") == len(low)
    # Each shape's yardstick is one of those that only move the bytes, and is 1; it stands beside itself as the noise.
    floors = [row for row in rows if row["provider"] == "copy" or row["provider"].startswith("add + rmsnorm")]
    floors = [row for row in floors if row["provider"] == row["floor"]]
    assert floors and {row["of_floor"] for row in floors} == {1} and {row["verdict"] for row in floors} == {"-"}
    assert {row["fraction_of_copy"] for row in rows if row["provider"] == "copy"} == {1}
    assert {row["error_over_bound"] for row in rows if row["provider"] == "copy"} == {0}
    assert all(row["noise"] >= 0 and row["ratio_ci95"][0] <= row["ratio"] <= row["ratio_ci95"][1] for row in rows)


@pytest.mark.slow
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
    # The others stand: in both dtypes each against the copy.
    others = len(real(op.inputs(1, 64, 3, torch.float32, torch.device("cpu")), False))
    assert "2 of our own rows could not be run" in captured.err and captured.out.count(" of copy, ") == 2 * others > 0


@pytest.mark.slow
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
    assert "2 of our own rows exceed their bound" in captured.err and "exceeds its bound" in captured.out


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


def in_this_process(words):
    """Run [python, "-c", code, argument, ...] or [python, "-m", module, argument, ...] here: no start of Python."""
    _, how, what, *arguments = words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [how, *arguments])
        if how == "-c":
            exec(compile(what, "benchmark", "exec"), {"__name__": "__main__"})
        else:
            assert call(what.removeprefix("kernel_surgery."), *arguments)[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_checkpoint_benchmark_runs_beside_both_peers(tmp_path, capsys, monkeypatch):
    """At a small size: what is timed is checked from the files, and the first script's way is shown to be coarse.
    bake, cp and the hash run in processes of their own, as in the benchmark; the peers' code runs in this one."""
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(checkpoint, "QWEN", checkpoint.QWEN | small | {"vocab_size": 512})
    # One round, and none before it that is thrown away. What `interleaved` itself does is tested below.
    monkeypatch.setattr(
        checkpoint, "interleaved", lambda calls, rounds, done: {name: [call()] for name, call in calls.items()}
    )
    real = checkpoint.watched

    def watched(words):
        if words[2] not in (checkpoint.DENSE_CODE, checkpoint.PEFT_CODE):
            return real(words)
        in_this_process(words)
        return 1.0, {"resident": 1.0, "anonymous": 1.0}

    monkeypatch.setattr(checkpoint, "watched", watched)
    run = SimpleNamespace(**vars(subprocess) | {"run": lambda words, **options: in_this_process(words)})
    monkeypatch.setattr(checkpoint, "subprocess", run)
    out, work = tmp_path / "rows.json", tmp_path / "work"
    work.mkdir()
    words = ["--layers", "4", "--rounds", "1", "--peers", "--out", str(out), "--folder", str(work)]
    assert checkpoint.run(words) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    assert list(rows) == [checkpoint.COPY, checkpoint.HASHED, "bake", checkpoint.DENSE, checkpoint.PEFT]
    said = capsys.readouterr().out
    assert list(work.iterdir()) == [] and said.index("hashing as many bytes") < said.index("not correctly rounded")
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
    helpers |= {"logits", "tables", "plots", "reals", "architectures", "mathml", "api", "messages", "readme", "blocks"}
    assert set(every.BENCHES) == files - helpers
    assert every.run([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in every.BENCHES)
    for name in every.BENCHES:
        with pytest.raises(SystemExit) as left:
            every.run([name, "--help"])
        assert left.value.code == 0 and f"python -m bench.{name}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no benchmark 'speed'; the benchmarks are opcount, op"):
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


@pytest.mark.slow
def test_the_fit_benchmark_runs_and_tells_a_rough_subspace(tmp_path, capsys):
    from bench import fit

    out = tmp_path / "rows.json"
    assert fit.run(["--layers", "2", "--d", "256", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    assert rows[fit.OURS]["exact"] and rows[fit.OURS]["sine"] <= fit.ANGLE < rows[fit.TOP[0]]["sine"]
    assert rows[fit.SCRIPT]["speedup"] == 1 and "times the script's speed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_collect_benchmark_compares_bits_before_times(tmp_path, capsys, monkeypatch):
    import torch

    from bench import collect

    out = tmp_path / "rows.json"
    words = ["--model", "polyglot", "--problems", "1", "--rounds", "1", "--every", "1", "--only", "time"]
    assert collect.run([*words, "--batch-tokens", "1024", "512", "--out", str(out)]) == 0
    rows = {row["provider"]: row for row in json.loads(out.read_text(encoding="utf-8"))}
    assert set(rows) == {collect.BEFORE, collect.BODY, collect.OURS, f"{collect.OURS}, 512 tokens", collect.MOMENTS}
    assert rows[collect.BEFORE]["speedup"] == 1 and "times the speed before" in capsys.readouterr().out
    read = collect.read_whole

    def off_by_one_bit(*args, **options):
        return {layer: torch.nextafter(x, torch.ones(1)) for layer, x in read(*args, **options).items()}

    monkeypatch.setattr(collect, "read_whole", off_by_one_bit)
    with pytest.raises(RuntimeError, match="layer 0 has other bits than in the whole model: nothing was timed"):
        collect.run(words)


@pytest.mark.slow
def test_what_collect_adds_to_the_memory_does_not_depend_on_the_vocabulary():
    """At 49,152 and 151,936 tokens the peaks are within 5%. With the product, they are three times apart."""
    from bench import collect

    rows = collect.weighed({}, d=128, layers=2, prompts=96)
    added = {(row["provider"], row["size"]): row["added_bytes"] for row in rows}
    small, large = collect.VOCABULARIES
    print(f"{collect.unequal(rows):.3f} of the smaller peak; before {added[collect.BEFORE, large] / 1e6:.0f} MB")
    times = [{"case": "vectors", "provider": collect.OURS}]  # of the same run
    assert collect.unequal(times + rows) <= collect.SAME
    assert added[collect.BEFORE, large] / added[collect.BEFORE, small] > 2.5
    assert added[collect.OURS, large] < added[collect.BEFORE, small] / 5


@pytest.mark.slow
def test_the_evaluation_benchmark_compares_texts_before_times(tmp_path, capsys, monkeypatch):
    from bench import evaluation

    words = ["--problems", "1", "--languages", "en", "--rounds", "1", "--max-new-tokens", "24"]
    words += ["--out", str(tmp_path / "rows.json")]
    assert evaluation.run(words) == 0
    said = capsys.readouterr().out
    assert (
        said.count("5 texts, 5 the same as alone, 0 that differ by rounding") == 2 and "times the loop's speed" in said
    )
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["batch"] for row in rows] == [1, 64, 64] and len({row["tokens"] for row in rows}) == 1
    real = evaluation.batched

    def other(*args):
        return [(ids[0] + 1, *ids[1:]) for ids in real(*args)]

    monkeypatch.setattr(evaluation, "batched", other)
    assert evaluation.run(words) == 1 and "not the same text as alone" in capsys.readouterr().out


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

    # Three sizes each, the fewest that have a slope, and small ones: what the times are is not looked at here.
    small = {"tokens": (32, 64, 128), "d": (256, 512, 1024), "k": (4, 8, 16), "layers": (2, 3, 4)}
    small |= {"problems": (5, 10, 20), "languages": (2, 3, 4), "checkpoint": (3, 4, 5)}
    small |= {"moments": (32, 64, 128), "oblique": (32, 64, 128)}
    assert small.keys() == growth.SIZES.keys()
    monkeypatch.setattr(growth, "SIZES", small)
    assert growth.run(["--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().out
    for what in growth.EXPECTED:
        assert len([row for row in rows if row["case"] == what and row["cpu_us_p50"] > 0]) == 3
        assert said.index(f"{what:<11} expected slope") < said.index(
            "slope", said.index(f"{what:<11} expected slope") + 40
        )


def test_busy_compares_alone_and_beside_and_fails_above_the_goal(monkeypatch, tmp_path, capsys):
    from bench import busy

    beside = {busy.OURS: 2.0, busy.SPINNING: 8.0}
    running = []

    @contextlib.contextmanager
    def loaded(processes):
        running.append(processes)
        yield
        running.pop()

    monkeypatch.setattr(busy, "busy", loaded)
    monkeypatch.setattr(busy, "seconds", lambda how, problems: 10.0 * (beside[how] if running[-1] else 1.0))
    out = tmp_path / "busy.json"
    assert busy.run(["--rounds", "2", "--processes", "3", "--out", str(out)]) == 0
    rows = {(r["provider"], r["case"]): r for r in store.read(out)}
    assert rows.keys() == {(how, load) for how in beside for load in (busy.ALONE, busy.BESIDE)}
    assert rows[busy.SPINNING, busy.BESIDE]["ratio"] == 8.0 and rows[busy.OURS, busy.BESIDE]["processes"] == 3
    beside[busy.OURS] = 2.6
    assert busy.run(["--rounds", "2"]) == 1
    assert "2.60 times alone" in capsys.readouterr().out


def test_busy_processes_end_with_the_block_and_settings_of_the_caller_do_not_count(monkeypatch):
    from bench import busy

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & busy.environment(busy.OURS).keys()
    assert busy.environment(busy.SPINNING)["OMP_WAIT_POLICY"] == "active"
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    with busy.busy(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)
