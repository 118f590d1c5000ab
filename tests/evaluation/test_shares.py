"""Several processes answer one run: shares are even, kept after a kill, and merged into what one process writes."""

import json
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from kernel_surgery import POLYGLOT_SUBSPACE, Subspace
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.answering import Context
from kernel_surgery.evaluation.run import evaluate
from kernel_surgery.evaluation.samples import append_cell, read_cells
from kernel_surgery.evaluation.shares import answer_together, share_file, share_of, take_up_together
from kernel_surgery.models.load import load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from tests.support.processes import killed_when
from tests.support.ranks import run, torchrun
from tests.support.ties import first_difference, not_near_ties
from tests.support.together import together


@pytest.mark.parametrize("order", ["one category after the other", "in turn"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_process_has_as_many_of_each_category_and_in_all(size, count, order):
    asked = problems("test", count)
    if order == "in turn":  # every fifth is of one category, so a plain every fifth would be
        asked = [asked[row * count + column] for column in range(count) for row in range(len(asked) // count)]
    shares = [share_of(asked, Ranks(rank, size)) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(len(asked)))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for category in {problem.category for problem in asked}:
        counts = [sum(asked[i].category == category for i in share) for share in shares]
        assert max(counts) - min(counts) <= 1, (category, counts)


def sample(problem, name, language):
    return {
        **{"id": problem.id, "prompt": problem.prompts[language], "mode": name, "language": language},
        "text": f"{name} {language} {problem.id}",
    }


def answering(asked_of, stops=None):
    """An `answer` that writes what it is asked like `answer_cells`, and records it. stops: after so many cells."""

    def answer(context, done, samples):
        cells, new = dict(done), 0
        for name in ("original", "fused"):
            for language in context.languages:
                if (name, language) in cells:
                    continue
                if new == stops:
                    raise KeyboardInterrupt
                cell = [sample(problem, name, language) for problem in context.problems]
                asked_of.append((name, language, len(cell)))
                append_cell(samples, cell)
                cells[name, language], new = cell, new + 1
        return {(name, language): cells[name, language] for name in ("original", "fused") for language in ("en", "zh")}

    return answer


def as_before(problem, sample):
    return sample


@pytest.fixture
def context():
    return Context(SimpleNamespace(), SimpleNamespace(), tuple(problems("test", 3)), ("en", "zh"), 16)


def shared(size, context, samples, asked_of, stops=None):
    def work(ranks):
        done = take_up_together(ranks, samples, context.problems, as_before)
        return answer_together(ranks, context, done, samples, answering(asked_of, stops), as_before)

    return together(size, work)


def test_the_merged_file_is_one_processs_byte_for_byte(context, tmp_path):
    alone = answer_together(ALONE, context, {}, tmp_path / "one.jsonl", answering([]), as_before)
    for size in (2, 3, 20):  # 20: more than there are problems
        samples, asked_of = tmp_path / f"{size}.jsonl", []
        found = shared(size, context, samples, asked_of)
        assert found == [alone] * size
        assert samples.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        assert sum(texts for *_, texts in asked_of) == 4 * len(context.problems)
    assert {path.name for path in tmp_path.iterdir()} == {"one.jsonl", "2.jsonl", "3.jsonl", "20.jsonl"}


def test_a_killed_launch_goes_on_with_what_each_process_had_finished(context, tmp_path):
    samples, asked_of = tmp_path / "samples.jsonl", []
    # A cell from before the shares.
    append_cell(samples, [sample(problem, "original", "en") for problem in context.problems])
    found = shared(2, context, samples, asked_of, stops=1)
    assert all(isinstance(one, KeyboardInterrupt) for one in found)
    assert Counter(asked_of) == {("original", "zh", 8): 1, ("original", "zh", 7): 1}
    for rank in (0, 1):  # a share that is cut off loses the cell that is cut, and no other
        file = share_file(samples, Ranks(rank, 2))
        kept = file.read_bytes()
        file.write_bytes(kept + kept[:50].replace(b"original", b"fused"))
    asked_of.clear()
    with pytest.raises(UserError, match=r"holds the shares of 2 processes \(samples\.0-of-2\.jsonl\), this is one"):
        answer_together(ALONE, context, {}, samples, answering([]), as_before)
    first, second = shared(2, context, samples, asked_of)
    assert first == second and list(first) == [(m, lang) for m in ("original", "fused") for lang in ("en", "zh")]
    assert {name for name, *_ in asked_of} == {"fused"} and len(asked_of) == 4
    assert read_cells(samples, context.problems) == first
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_kill_between_the_merge_and_the_removal_changes_nothing(context, tmp_path):
    samples = tmp_path / "samples.jsonl"
    shared(2, context, samples, [])
    merged = samples.read_bytes()
    share = [problem for i, problem in enumerate(context.problems) if i in share_of(context.problems, Ranks(1, 2))]
    append_cell(share_file(samples, Ranks(1, 2)), [sample(problem, "fused", "zh") for problem in share])
    asked_of = []
    shared(2, context, samples, asked_of)
    assert not asked_of and samples.read_bytes() == merged and len(list(tmp_path.iterdir())) == 1


def test_processes_that_do_not_share_the_folder_are_told(context, tmp_path):
    def work(ranks):
        samples = tmp_path / str(ranks.rank) / "samples.jsonl"
        samples.parent.mkdir()
        try:
            return answer_together(ranks, context, {}, samples, answering([]), as_before)
        except UserError:
            ranks.failed()
            ranks.told()
            raise

    message = str(together(2, work)[0])
    assert message.startswith("process 1 has answered original in en, but ")
    assert "must share the folder --out" in message


ASKED = ("--problems", "1", "--max-new-tokens", "50", "--batch-size", "4", "--no-damage", "--controls", "haar:1")


@contextmanager
def edited(mode, model):
    with applied(mode, model, Subspace.load(POLYGLOT_SUBSPACE, force=True), 1.0, True):
        yield


@pytest.fixture(scope="module")
def polyglot():
    return load_model("polyglot", torch.float32), load_tokenizer("polyglot")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_one_processs_verdicts(tmp_path, polyglot):
    """On the embedded model. Texts may differ by near ties alone, which are counted."""
    options = {"problems": ["1"], "max_new_tokens": 50, "batch_size": 4, "no_damage": True, "controls": "haar:1"}
    one = evaluate(mode="fused", out=tmp_path / "one", device="cpu", **options)
    out = tmp_path / "two"
    shares = [share_file(out / "samples.jsonl", Ranks(rank, 2)) for rank in (0, 1)]
    words = ["-m", "kernel_surgery.eval", "--mode", "fused", *ASKED, "--device", "cpu", "--out", str(out)]
    killed_when(torchrun(*words), tmp_path, lambda: all(file.exists() and file.stat().st_size for file in shares))
    assert not (out / "samples.jsonl").exists() and not (out / "results.json").exists()
    kept = json.loads(shares[1].read_text().splitlines()[0])
    marked = kept | {"text": kept["text"] + " (kept)"}  # a text that is generated again would lose this
    shares[1].write_text(shares[1].read_text().replace(json.dumps(kept, ensure_ascii=False), json.dumps(marked), 1))
    done = run(torchrun(*words, "--resume"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("results.json, samples.jsonl, report.html") == 1 == done.stdout.count("controls: 1 haar")

    files = {"config.json", "controls.jsonl", "report.html", "results.json", "samples.jsonl"}
    assert {path.name for path in out.iterdir()} == files == {path.name for path in one.folder.iterdir()}
    results, before = (json.loads((folder / "results.json").read_text()) for folder in (out, one.folder))
    assert results["config"] == before["config"] and results["environment"]["processes"] == 2
    assert [row["name"] for row in results["controls"]["rows"]] == ["haar:00", "haar:00"]
    texts = [[json.loads(line) for line in (f / "samples.jsonl").open()] for f in (out, one.folder)]
    assert [(s["mode"], s["language"], s["id"]) for s in texts[0]] == [
        (s["mode"], s["language"], s["id"]) for s in texts[1]
    ]
    back = [s for s in texts[0] if s["text"].endswith(" (kept)")]
    assert [s["id"] for s in back] == [kept["id"]]
    back[0]["text"] = back[0]["text"].removesuffix(" (kept)")

    model, tokenizer = polyglot
    ties, wrong = not_near_ties(model, tokenizer, tokenizer.eos_token_id, edited, *texts)
    print(f"{ties} of {len(texts[0])} texts differ by a near tie")
    assert not wrong
    same = [(a, b) for a, b in zip(*texts, strict=True) if a["tokens"] == b["tokens"]]
    assert len(same) == len(texts[0]) - ties and all(a == b for a, b in same)
    if not ties:
        for mode, by_language in before["modes"].items():
            assert {lang: r["accuracy"] for lang, r in results["modes"][mode].items()} == {
                lang: r["accuracy"] for lang, r in by_language.items()
            }


def test_a_text_that_differs_otherwise_is_no_near_tie(polyglot):
    model, tokenizer = polyglot
    problem = problems("test", 1)[0]
    tokens = tokenizer(" 12 + 7 = 19.").input_ids
    one = {**sample(problem, "fused", "en"), "tokens": tokens, "correct": False}
    other = one | {"tokens": [*tokens[:2], tokens[2] + 1, *tokens[3:]]}
    assert not_near_ties(model, tokenizer, 0, edited, [one], [dict(one)]) == (0, [])
    ties, wrong = not_near_ties(model, tokenizer, 0, edited, [one], [other])
    assert ties == 1 and wrong[0]["at"] == 2 and wrong[0]["gap"] > 100 * wrong[0]["error"] > 0
    assert first_difference([1, 2], [1]) == 1 and first_difference([1, 2], [1, 2]) is None
