"""Several processes run one study: what they measure and write is one process's, kept after a kill or an error."""

import json
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from kernel_surgery import POLYGLOT_SUBSPACE, Subspace
from kernel_surgery.common.errors import KernelSurgeryError, SubspaceError, UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.common.ranks import ALONE, Ranks, StoppedElsewhere
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.shares import share_file
from kernel_surgery.models.load import load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from kernel_surgery.studies import opening
from kernel_surgery.studies.declaring import read_grid
from kernel_surgery.studies.measuring import Measuring
from kernel_surgery.studies.opening import TEXTS
from kernel_surgery.studies.searching import Row, search_settings, search_together
from kernel_surgery.studies.settings import Fitter
from kernel_surgery.studies.space import read_search
from kernel_surgery.studies.study import run_study
from tests.support.calls import one_thread
from tests.support.forked import launches
from tests.support.ties import not_near_ties
from tests.support.together import together


@cache
def polyglot(number):
    """A model of its own for each process of a test: edits are hooks, and hooks are the model's."""
    return load_model("polyglot", torch.float32)


@cache
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture(autouse=True)
def no_lock(monkeypatch):
    """Python 3.11 locks a cached property for all objects, so threads would wait for each other there for ever."""

    def original(self):
        if "_original" not in vars(self):
            vars(self)["_original"] = make(self)
        return vars(self)["_original"]

    make = vars(Measuring)["_original"].func
    monkeypatch.setattr(Measuring, "_original", property(original))


def launched(size, work):
    """As `together`, with processes that end as commands do: one that finds an error tells the others."""

    def one(ranks):
        threading.current_thread().name = str(ranks.rank)
        try:
            return work(ranks)
        except KernelSurgeryError:
            ranks.failed()
            ranks.told()
            raise

    with one_thread():
        return together(size, one)


# --- what is measured of an edit ---


def measuring(ranks):
    about = ("en", "zh"), problems("dev", 1), LANGUAGES, [2, 3, 4, 5], "hook", "dev"
    return Measuring(polyglot(ranks.rank), tokenizer(), *about, ranks=ranks, streams=[5, 7])


def test_a_measurement_is_shared_and_one_processs_bit_for_bit(monkeypatch):
    subspace, size = Subspace.load(POLYGLOT_SUBSPACE), 3  # one has no language

    def work(ranks):
        here = measuring(ranks)
        read = here.text.read
        here.text.read = lambda languages: shares.append((ranks, languages)) or read(languages=languages)
        return [here.measure(edit).whole() for edit in (None, subspace)]

    for rank in range(size):
        polyglot(rank)

    def probed(self, places):
        shares.append((self.ranks, list(places.values())))
        return probe(self, places)

    probe, shares = Measuring._probe, []
    monkeypatch.setattr(Measuring, "_probe", probed)
    (one,) = launched(1, work)
    shares.clear()
    found = launched(size, work)
    assert found == [one] * size
    by_rank = [[share for ranks, share in shares if ranks.rank == rank] for rank in range(size)]
    # Of the original, and of the edit. Put together as they come, layer 5 would be the second.
    own = [[["en"], [[2, 5], [5]]], [["zh"], [[3], [7]]], [[], [[4], []]]]
    assert by_rank == [share * 2 for share in own]
    nothing = {"mlp_out": [], "resid_post": []}
    assert measuring(ALONE)._probe(nothing) == ({"mlp_out": {}, "resid_post": {}}, {})  # of more processes than layers
    # In the same order too: JSON keeps it.
    assert [json.dumps(by) for by in found[-1]] == [json.dumps(by) for by in one]
    assert one[0] != one[1]


def test_an_edit_that_cannot_be_made_is_refused_in_all_processes_which_go_on():
    subspace = Subspace.load(POLYGLOT_SUBSPACE)

    def work(ranks):
        here = measuring(ranks)
        here.measure(None)
        if ranks.rank == 1:

            def read(**_):
                raise SubspaceError("not here")

            here.text.read = read
        with pytest.raises(SubspaceError, match="not here"):
            here.measure(subspace)
        return ranks.gathered(ranks.rank)

    assert launched(2, work) == [[0, 1]] * 2


# --- who asks Optuna ---


SPACE = {"method": ["oblique", "centroids"], "rank": {"low": 1, "high": 6}, "strength": {"low": 0.2, "high": 1.5}}
SEARCH = {"trials": 14, "space": SPACE}  # two more than are drawn without Optuna's model


def figures(setting):
    rank = setting.rank or 6
    if setting.method == "centroids" and rank > 3:
        raise SubspaceError("no such rank")
    return {"damage": rank**2 * setting.strengths[0], "probe": 1 / rank}


def test_one_process_asks_and_tells_and_all_measure_the_same_settings(tmp_path):
    search = read_search(SEARCH, "x")
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    one = search_settings(search, 8, "hook", tmp_path / "one", 0, figures)
    measured, asking = {rank: [] for rank in range(3)}, []

    def work(ranks):
        def measure(setting):
            measured[ranks.rank].append(setting)
            return figures(setting)

        def rows(lead):
            asking.append(ranks.rank)
            return search_settings(search, 8, "hook", tmp_path / "many", 0, lead)

        return search_together(ranks, measure, rows)

    assert launched(3, work) == [one] * 3 and asking == [0]
    assert measured[0] == measured[1] == measured[2] and len(measured[0]) > 10
    assert any(row.refused for row in one) and len(one) == 15


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_that_is_of_no_setting_ends_the_search_in_all_processes(tmp_path, failing):
    search = read_search(SEARCH, "x")

    def work(ranks):
        def measure(setting):
            ranks.wait()
            if ranks.rank == failing and setting.strengths != (1.0,):
                raise UserError("the folder is gone")
            return {"damage": ranks.agreed(1.0), "probe": 0.5}

        return search_together(ranks, measure, lambda lead: search_settings(search, 8, "hook", tmp_path, 0, lead))

    found = launched(2, work)
    assert isinstance(found[failing], UserError) and isinstance(found[1 - failing], StoppedElsewhere), found


def test_one_process_searches_alone():
    rows = [Row(-1, {}, "", {})]
    assert search_together(ALONE, figures, lambda measure: rows) is rows


# --- a whole study ---

COMMON = 'mode = "hook"\nproblems = 1\nlanguages = ["en"]\nmax_new_tokens = {tokens}\nbatch_size = 4\ndevice = "cpu"\n'
GRID = COMMON + "[grid]\nstrength = [1.0, 0.5]\n"
SEARCHED = COMMON + (
    '[search]\ntrials = 1\nprobed = 5\ncontrols = 0\nobjectives = ["damage", "probe", "accuracy"]\nlimits = {{}}\n'
    "[search.space]\nstrength = [0.5]\n"
)


def declared(folder, text, tokens):
    path = folder / "study.toml"
    path.write_text(text.format(tokens=tokens))
    return path


def study(folder, out, ranks=ALONE, said=None, controls="haar:1"):
    say = (lambda line: None) if said is None else said.append
    return run_study(read_grid(folder / "study.toml"), out, controls=controls, say=say, ranks=ranks)


@pytest.fixture
def one_model_at_a_time(monkeypatch):
    """Loading is not made for threads."""
    lock, real = threading.Lock(), opening.load_checked

    def load_checked(*about, **more):
        with lock:
            return real(*about, **more)

    monkeypatch.setattr(opening, "load_checked", load_checked)


def texts(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n") if line]


def differing(one, other):
    """How many texts of two folders differ, all of them by near ties. The settings differ in the strength alone."""
    chosen = replace(Subspace.load(other / "chosen.safetensors"), strengths={})

    def edited(name, model):
        if name == "original":
            return nullcontext()
        words = {"chosen": json.loads((other / "frozen.json").read_text())["cell"], "baseline": "strength 1"}
        strength = words.get(name, name).replace("=", " ").split("strength ")[1].split()[0]
        return applied("hook", model, chosen, float(strength), True)

    ties = 0
    for name in ("dev.jsonl", "test.jsonl"):
        both = texts(one, name), texts(other, name)
        found = not_near_ties(polyglot(0), tokenizer(), tokenizer().eos_token_id, edited, *both)
        assert not found[1]
        ties += found[0]
    print(f"{ties} texts differ by a near tie")
    return ties


def without_time(study):
    return {name: part for name, part in study.items() if name not in ("environment", "command", "search")}


@pytest.mark.slow
def test_a_grid_whose_second_process_fails_goes_on_to_what_one_process_writes(
    tmp_path, monkeypatch, one_model_at_a_time
):
    declared(tmp_path, GRID, 8)
    with one_thread():
        one = study(tmp_path, tmp_path / "one")
    out, real, asked = tmp_path / "many", opening.answer_cells, {"0": [], "1": []}

    def answer_cells(context, edits, done, samples):
        me, fail = threading.current_thread().name, failing and threading.current_thread().name == "1"
        asked[me].append(len(edits) * len(context.languages) - len(done))
        if fail:  # after a whole cell
            real(context, {"original": edits["original"]}, done, samples)
            raise UserError("process 1 has no luck.")
        return real(context, edits, done, samples)

    def activations(self, *about):
        fits.add(threading.current_thread().name)
        return activations_of(self, *about)

    monkeypatch.setattr(opening, "answer_cells", answer_cells)
    fits, activations_of = set(), Fitter.activations
    monkeypatch.setattr(Fitter, "activations", activations)
    failing = True
    found = launched(2, lambda ranks: study(tmp_path, out, ranks))
    assert isinstance(found[0], StoppedElsewhere) and str(found[1]) == "process 1 has no luck."
    assert not (out / "frozen.json").exists() and fits == {"0"} and asked == {"0": [3], "1": [3]}
    message = r"holds the shares of 2 processes \(dev\.0-of-2\.jsonl\), this is one of 1"
    with pytest.raises(UserError, match=message), monkeypatch.context() as before_it_loads:
        before_it_loads.setattr(opening, "load_checked", None)
        study(tmp_path, out)
    failing, said = False, []
    found = launched(2, lambda ranks: study(tmp_path, out, ranks, said))
    assert json.loads(json.dumps(found[0])) == found[1] == json.loads((out / "study.json").read_text())
    assert found[0]["environment"]["processes"] == 2 and len(said) == 1
    assert asked == {"0": [3, 0, 2], "1": [3, 2, 2]}  # of dev what was not finished, and test
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert (out / "chosen.safetensors").read_bytes() == (tmp_path / "one" / "chosen.safetensors").read_bytes()
    assert "processes" not in one["environment"]
    if not differing(tmp_path / "one", out):
        assert without_time(found[0]) == without_time(one)
        assert all((out / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in TEXTS)


def test_processes_that_do_not_share_the_folder_are_told(tmp_path, one_model_at_a_time):
    declared(tmp_path, GRID, 8)
    found = launched(2, lambda ranks: study(tmp_path, tmp_path / str(ranks.rank), ranks))
    assert isinstance(found[0], StoppedElsewhere) and str(found[1]).startswith("process 1 does not find ")
    assert "All processes must share the folder --out" in str(found[1]) and not (tmp_path / "1").exists()


def test_texts_of_an_engine_need_one_process(tmp_path):
    declared(tmp_path, 'engine = "vllm"\n' + GRID.replace("hook", "fused"), 8)
    found = launched(2, lambda ranks: study(tmp_path, tmp_path / "out", ranks))
    for one in found:
        assert isinstance(one, UserError | StoppedElsewhere)
    assert 'engine = "vllm" answers all problems itself, so its study runs in one process, not 2' in str(found[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_real_processes_fail_are_killed_and_started_again_and_search_as_one_does(tmp_path):
    """On the embedded model, over gloo. Texts may differ by near ties alone, which are counted."""
    out, file = tmp_path / "two", declared(tmp_path, SEARCHED, 16)
    shares = [share_file(out / "dev.jsonl", Ranks(rank, 2)) for rank in (0, 1)]
    with launches(tmp_path) as launch:
        words = "kernel_surgery.study", file, "--out"
        # One that fails ends the other, with one message.
        statuses, said = launch(2, [*words, out], failing=1)
        assert statuses == [2, 2] and said[0] == "", said
        assert said[1] == f"error: process 1 has no luck.\nThe files in {str(out)!r} were kept.\n"
        assert all(share.stat().st_size for share in shares) and not (out / "dev.jsonl").exists()
        kept = json.loads(shares[1].read_text().splitlines()[0])
        marked = kept | {"text": kept["text"] + " (kept)"}  # a text that is generated again would lose this
        shares[1].write_text(shares[1].read_text().replace(json.dumps(kept, ensure_ascii=False), json.dumps(marked), 1))
        # Killed when all is chosen, and one edit is measured on test.
        assert launch(2, [*words, out], until=[out / "measured.json"])[0] == [-9, -9]
        frozen = (out / "frozen.json").read_bytes()
        assert not (out / "test.jsonl").exists() and not (out / "study.json").exists()
        statuses, said = launch(2, [*words, out])
        assert statuses == [0, 0] and said[1] == "" and said[0].count("choice frozen: ") == 1, said
        assert "1 of 1 settings are measured; going on from there" in said[0]
        assert (out / "frozen.json").read_bytes() == frozen
        assert launch(1, [*words, tmp_path / "one"])[0] == [0]
    one, many = (json.loads((tmp_path / name / "study.json").read_text()) for name in ("one", "two"))
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    back = [s for s in texts(out, "dev.jsonl") if s["text"].endswith(" (kept)")]
    assert [s["id"] for s in back] == [kept["id"]]
    (out / "dev.jsonl").write_text((out / "dev.jsonl").read_text().replace(" (kept)", ""))
    ties = differing(tmp_path / "one", out)
    # The first settings are drawn whatever was measured, and only two figures depend on texts. A trial that did not end
    # has taken a number.
    rows = [[dict(row) for row in study["search"]["rows"]] for study in (many, one)]
    for row in (*rows[0], *rows[1]):
        assert 0 <= row.pop("accuracy") <= 1 and 0 <= row.pop("fidelity") <= 1 and row.pop("number") >= -1
    assert rows[0] == rows[1] and len(rows[0]) == 2
    if not ties:
        assert without_time(many) == without_time(one)
