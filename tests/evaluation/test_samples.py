"""An evaluation's folder: nothing finished is lost, nothing half-written is kept, and no two runs are mixed."""

import json
import os

import pytest

from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.samples import append_cell, digest, open_run, read_cells, take_up, write_cells
from kernel_surgery.problems.generator import problems


@pytest.fixture
def asked():
    return problems("test", 2)


def cell(asked, mode, language, text="所以答案是 7。"):
    return [
        {"id": p.id, "prompt": p.prompts[language], "mode": mode, "language": language, "text": text, "n": i}
        for i, p in enumerate(asked)
    ]


def test_a_cell_cut_at_any_byte_is_dropped_alone_and_can_be_written_again(asked, tmp_path):
    samples, first, second = tmp_path / "samples.jsonl", cell(asked, "original", "zh"), cell(asked, "fused", "zh")
    append_cell(samples, first)
    whole = samples.stat().st_size
    append_cell(samples, second)
    everything = samples.read_bytes()
    # Every byte of the first two and the last two lines of the second cell: inside characters, at line ends, anywhere.
    cuts = [*range(whole, whole + 500), *range(len(everything) - 500, len(everything))]
    for cut in cuts:
        samples.write_bytes(everything[:cut])
        kept = take_up(samples, asked, lambda problem, sample: sample)
        wanted = {("original", "zh")} if cut < len(everything) - 1 else {("original", "zh"), ("fused", "zh")}
        assert set(kept) == wanted, cut
        if cut % 97 == 0 and ("fused", "zh") not in kept:
            append_cell(samples, second)
            assert read_cells(samples, asked) == {("original", "zh"): first, ("fused", "zh"): second}


def test_separators_inside_a_text_do_not_end_a_line(asked, tmp_path):
    strange = cell(asked, "original", "en", text="one\u2028two\u2029three\x85four\nfive\x1csix")
    append_cell(tmp_path / "s", strange)
    assert read_cells(tmp_path / "s", asked) == {("original", "en"): strange}


def test_only_the_prompts_asked_in_their_order_make_a_cell(asked, tmp_path):
    right = cell(asked, "original", "en")
    other = problems("test", 2, seed=1)
    for wrong in (right[::-1], right[:-1], [*right, right[0]], cell(other, "original", "en"), [right[0]] * len(right)):
        write_cells(tmp_path / "s", {("original", "en"): wrong})
        assert read_cells(tmp_path / "s", asked) == {}
    write_cells(tmp_path / "s", {("original", "en"): right})
    assert read_cells(tmp_path / "s", asked) == {("original", "en"): right}
    assert read_cells(tmp_path / "none", asked) == {}


def test_what_is_kept_is_judged_by_the_code_that_runs_now(asked, tmp_path):
    append_cell(tmp_path / "s", cell(asked, "original", "en"))
    kept = take_up(tmp_path / "s", asked, lambda problem, sample: sample | {"correct": problem.answer == 7})
    assert [s["correct"] for s in kept["original", "en"]] == [p.answer == 7 for p in asked]
    assert read_cells(tmp_path / "s", asked) == kept


CONFIG = {"mode": "fused", "strength": 1.0, "weights": digest([1]), "languages": ["en"]}


def test_a_run_is_gone_on_with_only_if_nothing_it_depends_on_changed(tmp_path):
    open_run(tmp_path / "deep" / "run", CONFIG, resume=False)
    run = tmp_path / "deep" / "run"
    assert json.loads((run / "config.json").read_text()) == CONFIG
    open_run(run, CONFIG, resume=True)
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run\. Continue it with --resume"):
        open_run(run, CONFIG, resume=False)
    for key, value in {"mode": "all", "strength": 2.0, "weights": digest([2]), "languages": ["en", "zh"]}.items():
        with pytest.raises(UserError, match=f"other settings: {key} was "):
            open_run(run, CONFIG | {key: value}, resume=True)
    (run / "config.json").write_bytes(before[:10])
    with pytest.raises(UserError, match="cannot be read"):
        open_run(run, CONFIG, resume=True)
    assert os.listdir(run) == ["config.json"]


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "report.html"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_that_are_not_a_run_are_left_alone(name, resume, tmp_path):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(UserError, match=f"holds {name} but no config.json"):
        open_run(tmp_path, CONFIG, resume=resume)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "somebody's"
