"""A declared grid: chosen on dev, frozen before test, and nothing finished is lost when it is killed."""

import json
import random
import subprocess
import sys

import pytest

from kernel_surgery import Subspace
from kernel_surgery.common.errors import UserError
from kernel_surgery.files.hashing import sha256
from kernel_surgery.problems.generator import problems
from kernel_surgery.studies.declaring import cells_of, read_grid
from kernel_surgery.studies.reporting import Reporting
from kernel_surgery.studies.settings import Fitter, Setting
from kernel_surgery.studies.study import choose, frozen_digest
from kernel_surgery.study import run

GRID = """
mode = "hook"
problems = 1
max_new_tokens = 40
[grid]
rank = [2, 10]
strength = [1.0, 2.0]
"""


def declared(tmp_path, text=GRID):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


def test_the_grid_is_the_product_in_the_order_declared(tmp_path):
    made = read_grid(declared(tmp_path))
    assert made["model"] == "polyglot" and made["budget"] == 40 and made["languages"] == ["en", "zh"]
    cells = cells_of(made["grid"])
    assert [(c["rank"], c["strength"]) for c in cells.values()] == [(2, 1.0), (2, 2.0), (10, 1.0), (10, 2.0)]
    assert next(iter(cells)) == "rank=2 site=mlp_out pool=last strength=1.0 layers=middle"
    one, other = list(cells.values())[:2]
    assert frozen_digest(one, made) == frozen_digest(dict(one), dict(made)) != frozen_digest(other, made)
    assert frozen_digest(one, made) != frozen_digest(one, made | {"seed": 1})


@pytest.mark.parametrize(
    "text, message",
    [
        ("rank = [1]", "unknown setting 'rank'"),
        ("[grid]\nsize = [1]", "unknown setting 'grid.size'"),
        ("[grid", "is not TOML"),
        ("[grid]\nrank = 10", r"grid\.rank is 10, not a list"),
        ("[grid]\nrank = []", r"grid\.rank is \[\], not a list"),
        ("[grid]\nrank = ['x']", r"grid\.rank is \['x'\], not a list"),
        ("[grid]\nsite = ['attn']", "grid.site has 'attn'; known: mlp_out, resid_post"),
        ("mode = 'original'", "mode is 'original'; known: hook"),
        ("test = 'some'", "test is 'some'; known: chosen, all"),
        ("problems = 0", "problems is 0, not a whole number of at least 1"),
        ("max_new_tokens = 8\nbudget = 9", "budget is 9, above max_new_tokens, 8"),
        ("languages = ['fr']", "unknown language 'fr'"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        run([str(declared(tmp_path, text)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_best_on_dev_is_chosen_and_of_equals_the_first():
    dev = {
        name: {"en": {"accuracy": a}, "zh": {"accuracy": b}}
        for name, a, b in (("x", 1, 0), ("y", 0.5, 0.5), ("z", 0, 0.9))
    }
    assert choose(dev, ["x", "y", "z"]) == "x" and choose(dev, ["y", "x"]) == "y"
    assert choose(dev | {"w": {"en": {"accuracy": 0.6}, "zh": {"accuracy": 0.5}}}, ["x", "w"]) == "w"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    assert run([str(declared(folder)), "--out", str(out), "--controls", "haar:2"]) == 0
    return folder


@pytest.mark.slow
def test_a_study_is_one_file_and_what_it_froze(done, capsys):
    out = done / "out"
    made = json.loads((out / "study.json").read_text())
    assert (
        len(made["dev"]) == 5
        and made["frozen"]["of"] == 4
        and list(made["test"]) == ["original", made["frozen"]["cell"]]
    )
    assert made["frozen"]["cell"] == choose(made["dev"], list(made["dev"])[1:])
    assert made["frozen"] == json.loads((out / "frozen.json").read_text())
    subspace = Subspace.load(out / "chosen.safetensors")
    assert subspace.rank == made["frozen"]["setting"]["rank"] and subspace.fit["split"] == "fit"
    assert made["controls"]["count"] == 2 and made["declared"]["grid"]["rank"] == [2, 10]
    assert [r["language"] for r in made["paired"]] == ["en", "zh", "all"]
    # Dev was asked of every cell, test of the original and the chosen one alone.
    dev, test = (
        [json.loads(line) for line in (out / f"{s}.jsonl").read_text().split("\n") if line] for s in ("dev", "test")
    )
    assert {s["id"] for s in dev} == {p.id for p in problems("dev", 1)} and len(dev) == 5 * 2 * 5
    assert {s["id"] for s in test} == {p.id for p in problems("test", 1)} and len(test) == 2 * 2 * 5
    # Again: nothing is asked anew, and the same stands there.
    kept = {name: (out / name).read_bytes() for name in ("dev.jsonl", "test.jsonl", "frozen.json")}
    words = [str(done / "grid.toml"), "--out", str(out), "--controls", "haar:2"]
    assert run(words) == 0 and kept == {name: (out / name).read_bytes() for name in kept}
    said = capsys.readouterr().out
    assert "<- chosen" in said and "one of 4 settings\ntest problems, 5 per language:" in said
    assert "2 random subspaces (haar)" in said
    # Another declaration, or another choice than the frozen one, does not go on in it.
    with pytest.raises(UserError, match="holds a run with other settings: problems was 1, now 2"):
        run([str(declared(done, GRID.replace("problems = 1", "problems = 2"))), "--out", str(out)])
    declared(done)
    (out / "frozen.json").write_text("{}")
    with pytest.raises(UserError, match="holds another choice than dev gives now"):
        run(words)
    (out / "frozen.json").write_bytes(kept["frozen.json"])


@pytest.mark.slow
def test_all_cells_may_be_reported_and_a_budget_cuts_the_texts(tmp_path):
    text = GRID.replace("[2, 10]", "[10]").replace('mode = "hook"', 'mode = "hook"\ntest = "all"\nbudget = 12')
    assert run([str(declared(tmp_path, text)), "--out", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "study.json").read_text())
    assert len(made["test"]) == 3 and len(made["paired"]) == 6
    for by in (*made["dev"].values(), *made["test"].values()):
        for r in by.values():
            assert r["mean_tokens"] <= 12 and r["fat_budget"] == 12 and r["stopped"] == 0
    # The texts are kept whole.
    lines = (tmp_path / "out" / "dev.jsonl").read_text().split("\n")
    assert max(len(json.loads(line)["tokens"]) for line in lines if line) > 12


SEARCH = """
mode = "hook"
problems = 1
max_new_tokens = 24
[search]
trials = 3
probed = 5
controls = 1
objectives = ["damage", "probe", "accuracy"]
limits = {probe = "baseline"}
[search.space]
rank = {low = 1, high = 6}
strength = [1.0, 2.0]
"""


@pytest.mark.slow
def test_a_search_freezes_its_choice_before_the_test_half_is_read(tmp_path, capsys, monkeypatch):
    words = [str(declared(tmp_path, SEARCH)), "--out", str(tmp_path / "out")]
    out = tmp_path / "out"
    # Killed before the first test figure: the choice is frozen by then.
    real = Reporting.on_test

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reporting, "on_test", killed)
    with pytest.raises(KeyboardInterrupt):
        run(words)
    frozen = json.loads((out / "frozen.json").read_text())
    assert not (out / "test.jsonl").exists() and not (out / "measured.json").exists()
    assert frozen["of"] == 4 and frozen["subspace_sha256"] == sha256(out / "chosen.safetensors")
    monkeypatch.setattr(Reporting, "on_test", real)
    # It goes on: no setting is measured again, and nothing is fitted again but the baseline.
    fits, fit = [], Fitter.fit
    monkeypatch.setattr(Fitter, "fit", lambda self, setting: fits.append(setting) or fit(self, setting))
    assert run(words) == 0
    said, made = capsys.readouterr().out, json.loads((out / "study.json").read_text())
    assert [setting.name for setting in fits] == [made["search"]["baseline"]]
    assert made["frozen"] == frozen and len(made["search"]["rows"]) == 4
    rows = {row["number"]: row for row in made["search"]["rows"]}
    chosen = rows[made["search"]["chosen"]]
    assert chosen["name"] == frozen["cell"] and chosen["probe"] <= rows[-1]["probe"]
    assert list(made["measured"]) == ["original", "baseline", "chosen", "haar:0", "matched:0"]
    assert list(made["test"]) == ["original", "chosen", "baseline"] and 0 <= chosen["accuracy"] <= 1
    subspace = Subspace.load(out / "chosen.safetensors")
    assert subspace.strengths == {i: s for i, s in Setting.of(chosen["setting"]).schedule().items() if s != 1}
    assert "3 of 3 settings are measured; going on from there" in said and "<- " in said and "one of 4 settings" in said
    assert (out / "report.html").read_text().count("<svg xmlns") == 2
    # Another file under the frozen name is refused.
    (out / "chosen.safetensors").write_bytes((out / "chosen.safetensors").read_bytes() + b" ")
    with pytest.raises(UserError, match=r"is not the subspace that .* names"):
        run(words)


# Imports once; every study is a fork of that, killed after a while that is given on a line of stdin.
SERVER = """
import os, signal, sys, time
import torch, transformers, scipy.stats
import kernel_surgery.studies.study
from kernel_surgery import study
grid, out = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        sys.stdout = open(os.devnull, "w")
        os._exit(study.run([grid, "--out", out]) or 0)
    end, done = time.monotonic() + float(line), 0
    while not done and time.monotonic() < end:
        time.sleep(0.01)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    print(status, flush=True)
"""


@pytest.mark.slow
def test_ten_kills_lose_no_finished_cell(tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    words = [sys.executable, "-c", SERVER, str(declared(tmp_path)), str(out)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"

        def go(seconds):
            server.stdin.write(f"{seconds}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        def finished():
            """Whole cells on disk, in order: what must never be made again."""
            found = []
            for name in ("dev", "test"):
                file = out / f"{name}.jsonl"
                lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
                found += [lines[i : i + 5] for i in range(0, len(lines) - len(lines) % 5, 5)]
            return found

        killed, seen = 0, []
        for _ in range(60):
            if killed == 10:
                break
            status = go(rng.uniform(0.2, 1.4))
            now = finished()
            assert now[: len(seen)] == seen[: len(now)] and len(now) >= len(seen), (
                "a finished cell is gone, or made again"
            )
            seen, killed = now, killed + (status == 9)
            if status == 0:  # done before it could be killed: from the beginning
                for file in out.iterdir():
                    file.unlink()
                seen = []
        print(f"{killed} kills")
        assert killed == 10
        assert go(120) == 0 and finished()[: len(seen)] == seen
        server.stdin.close()
    assert len(json.loads((out / "study.json").read_text())["dev"]) == 5
