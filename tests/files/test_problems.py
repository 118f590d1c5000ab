"""Anyone's own problems: what a file must hold, which split a problem is in, and that no fit sees what eval asks."""

import json
from types import SimpleNamespace

import pytest

from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.judging import judged
from kernel_surgery.evaluation.notes import check_held_out, fitted_on, notes_of
from kernel_surgery.evaluation.options import Asked, Options
from kernel_surgery.files.problems import problem_source, split_of_id
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.moments import load_moments
from tests.support.calls import call, one_thread


def row(number: int, answer: object = None, **changes) -> dict:
    prompts = {"en": f"Add {number} and 2.", "zh": f"把 {number} 和 2 相加。"}
    return {"id": f"p{number}", "answer": number + 2 if answer is None else answer, "prompts": prompts} | changes


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def tsv(folder, name="toy", **tables):
    folder.mkdir(exist_ok=True)
    for language, lines in tables.items():
        (folder / f"{name}_{language}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_number_means_generated_problems_as_before():
    for given in (3, "3", ["3"]):
        assert problem_source(given, seed=1).split("test") == problems("test", 3, seed=1)
    source = problem_source(None)
    assert source.split("fit") == problems("fit", 40) and source.record == {} and source.note("test") is None


def test_a_file_has_three_splits_that_share_nothing(tmp_path):
    source = problem_source([str(jsonl(tmp_path / "own.jsonl", map(row, range(200))))])
    ids = {name: {p.id for p in source.split(name)} for name in ("fit", "dev", "test")}
    assert sum(map(len, ids.values())) == 200 == len(set.union(*ids.values()))
    assert 100 <= len(ids["fit"]) <= 140 and 25 <= len(ids["dev"]) <= 55 and 25 <= len(ids["test"]) <= 55
    fewer = problem_source([str(jsonl(tmp_path / "less.jsonl", map(row, range(50, 90))))])
    assert all({p.id for p in fewer.split(name)} <= ids[name] for name in ids), "the split is the id's, not the file's"
    assert split_of_id("p7") == problem_source(tmp_path / "own.jsonl").own[7][1].split
    assert len(source.record["problems_sha256"]) == 64
    assert source.note("test").startswith("problems of own.jsonl (SHA-256 ")
    assert f"{len(ids['test'])} of 200 are in the test split" in source.note("test")


def test_mgsm_files_are_parallel_by_line(tmp_path):
    folder = tsv(tmp_path / "mgsm", en=["How many?\t1,234", "And \tnow?\t2.5"], zh=["多少？\t1234", "现在呢？\t2.50"])
    tsv(tmp_path / "mgsm", fr=["Combien ?\t1234", "Et là ?\t2.5"])  # in a language that is not judged
    source = problem_source([str(folder)])
    (_, first), (_, second) = source.own
    assert first.prompts == {"en": "How many?", "fr": "Combien ?", "zh": "多少？"}
    assert first.answer == 1234 and first.id == "toy-0001"
    assert second.prompts["en"] == "And \tnow?" and second.answer == "2.5"
    assert source.languages() == ("zh", "en") and source.languages(judged=False) == ("zh", "en", "fr")
    assert source.record["problems_file"] == "toy_*.tsv"
    files = [str(folder / f"toy_{language}.tsv") for language in ("en", "zh")]
    assert problem_source(files).own[1][1].prompts == {"en": "And \tnow?", "zh": "现在呢？"}


@pytest.mark.parametrize(("text", "right"), [("It is 2.5.", True), ("It is 5/2.", True), ("It is 25.", False)])
def test_an_answer_need_not_be_whole(text, right):
    assert judged(text, "How long is it?", "en", "2.5")["correct"] is right


BAD = {
    "no JSON": ("{", r"line 1 is not JSON"),
    "a list": ("[1]", r"line 1 is a list, not an object"),
    "no answer": ('{"id": "1", "prompts": {}}', r"line 1 has no 'answer'\. Expected \{"),
    "an id that is yes": (json.dumps(row(1, id=True)), r"line 1: the id is true"),
    "the same id": (f"{json.dumps(row(1))}\n\n{json.dumps(row(1))}", r"line 3: line 1 has the id 'p1' too"),
    "an answer in words": (json.dumps(row(1, "three")), r'line 1: the answer is "three"\. It must be one number'),
    "two answers": (json.dumps(row(1, "1 or 2")), r"line 1: the answer is"),
    "an answer that is yes": (json.dumps(row(1, True)), r"line 1: the answer is true"),
    "no number": ('{"id": "1", "answer": NaN, "prompts": {"en": "x"}}', r"line 1: the answer is NaN"),
    "no prompts": (json.dumps(row(1, prompts=["x"])), r"line 1: 'prompts' is not an object"),
    "an empty prompt": (json.dumps(row(1, prompts={"en": " "})), r"line 1: the prompt in 'en' is"),
    "a language missing": (
        f"{json.dumps(row(1))}\n{json.dumps(row(2, prompts={'en': 'x'}))}",
        r"line 2: problem 'p2' has no prompt in 'zh'",
    ),
    "nothing": ("\n", r"holds no problems: it is empty"),
    "too few": (json.dumps(row(1)), r"none of its 1 problems is in the test split"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_error_with_its_line(name, tmp_path):
    path, (text, said) = tmp_path / "own.jsonl", BAD[name]
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        Options(problems=[str(path)], languages="en,zh").asked()
    status, _, error = call("collect", "--problems", path, "--split", "test", "--out", tmp_path / "acts.safetensors")
    assert status == 2 and "No file was written." in error and not list(tmp_path.glob("acts*"))


def test_bad_tables_too(tmp_path):
    for name, tables, said in (
        ("uneven", {"en": ["a\t1"], "zh": ["甲\t1", "乙\t2"]}, r"has 2 problems, but toy_en\.tsv has 1\. Line n must"),
        ("other", {"en": ["a\t1", "b\t2"], "zh": ["甲\t1", "乙\t3"]}, r"line 2: the answer is 3, but 2 in toy_en\.tsv"),
        ("tabless", {"en": ["a 1"]}, r"line 1: expected a question, a tab and the answer"),
    ):
        with pytest.raises(UserError, match=said):
            problem_source([str(tsv(tmp_path / name, **tables))])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "latin_en.tsv").write_bytes(b"caf\xe9\t1\n")
    for given, said in (
        ([str(tmp_path / "none")], "no problems at"),
        (["some"], "no problems at 'some': --problems takes a number per category"),
        ([str(tmp_path / "notes.txt")], r"holds no problems that are known: --problems takes"),
        ([str(tmp_path / "latin_en.tsv")], r"is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=said):
            problem_source(given)


def foreign(path, *languages):
    """A file of problems in these languages; what it says does not matter."""
    prompts = [{language: f"{language}: {n} + 2 =" for language in languages} for n in range(40)]
    return jsonl(path, [row(n, prompts=texts) for n, texts in enumerate(prompts)])


def test_any_language_of_a_file_is_collected_and_seven_are_judged(tmp_path):
    path, acts = foreign(tmp_path / "own.jsonl", "pt-BR", "de", "en"), tmp_path / "acts.safetensors"
    source = problem_source(path)
    assert source.languages() == ("en",) and source.languages("de, en,de", judged=False) == ("de", "en")
    with one_thread():
        given = ("--problems", path, "--layers", "2-5", "--device", "cpu", "--overwrite")
        for pool, languages, more in (
            ("tokens", ["en", "pt-BR", "de"], ()),
            ("last", ["de", "en", "pt-BR"], ("--method", "deviations")),  # as the names in the file are sorted
        ):
            assert call("collect", *given, "--pool", pool, "--out", acts)[0] == 0
            status, out, error = call("fit", "--activations", acts, *more, "--out", tmp_path / pool)
            assert status == 0, error
            assert Subspace.load(tmp_path / pool).fit["languages"] == languages, out
            assert "in " + " ".join(languages) in str(Subspace.load(tmp_path / pool))
        words = ("--sequential", "--model", "polyglot", *given, "--languages", "pt-BR,de", "--out", tmp_path / "one")
        status, _, error = call("fit", *words)
        assert status == 0, error
    assert Subspace.load(tmp_path / "one").rank == 1
    own, odd = foreign(tmp_path / "neither.jsonl", "de", "fr"), foreign(tmp_path / "odd.jsonl", "en", "de/at")
    for command, words, said in (
        ("collect", ("--problems", path, "--languages", "en,fr"), "own.jsonl has no prompts in 'fr': --languages"),
        ("collect", ("--problems", odd), "prompts in 'de/at'. A language is a tag"),
        ("collect", ("--languages", "en,fr"), "A file of --problems may be in others."),
        ("eval", ("--problems", own, "--languages", "all"), "neither.jsonl is in de, fr. Answers are judged in"),
        ("eval", ("--problems", path, "--languages", "en,de"), "unknown language 'de': choose from zh, en,"),
    ):
        status, _, error = call(command, *words, "--out", tmp_path / "none")
        assert status == 2 and said in error and not (tmp_path / "none").exists(), error


def test_a_fit_on_the_problems_that_are_asked_is_refused():
    """By split and file: what another file holds is not known, and generated problems are in none."""
    own, other = {"problems_file": "a.jsonl", "problems_sha256": "a"}, {"problems_file": "b", "problems_sha256": "b"}
    for fit, record, where in (
        ({"split": "test"}, {}, "test"),
        ({"split": "test"} | own, own, "test"),
        ({"split": "fit"} | own, own, "fit"),
        ({"split": "test"}, own, "elsewhere"),
        ({"split": "test"} | own, {}, "elsewhere"),
        ({"split": "test"} | other, own, "another file"),
        ({}, own, None),
    ):
        subspace, asked = SimpleNamespace(fit=fit), Asked((), (), record, None)
        assert fitted_on(subspace, asked) == where
        if where == "test":
            with pytest.raises(UserError, match="fitted on the test problems"):
                check_held_out(subspace, Options(), asked)
        else:
            check_held_out(subspace, Options(), asked)
    subspace = SimpleNamespace(fit={"split": "fit"} | other)
    said = notes_of(subspace, {}, Options(), asked=Asked((), (), own, "its origin"))
    assert said == ["the subspace was fitted on problems of another file, b: some may be among these", "its origin"]


def test_the_commands_ask_them(tmp_path):
    path = jsonl(tmp_path / "own.jsonl", map(row, range(40)))
    source, acts, space = problem_source(path), tmp_path / "acts.safetensors", tmp_path / "space.safetensors"
    with one_thread():
        status, out, error = call("collect", "--problems", path, "--layers", "2-5", "--device", "cpu", "--out", acts)
        assert (status, error) == (0, "") and source.note("fit") in out
        held = load_moments(acts).provenance
        assert source.record.items() <= held.items() and held["languages"] == ["zh", "en"]
        assert held["problems"] == len(source.split("fit")) and str(tmp_path) not in json.dumps(held)
        assert call("fit", "--activations", acts, "--out", space, "--rank", 1, "--layers", "2-5")[0] == 0
        assert source.record.items() <= Subspace.load(space).fit.items()
        words = ("--subspace", space, "--problems", path, "--mode", "hook", "--max-new-tokens", 4, "--no-damage")
        status, out, error = call("eval", *words, "--controls", "haar:1", "--device", "cpu", "--out", tmp_path / "run")
        assert (status, error) == (0, "") and source.note("test") in out
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert source.record.items() <= results["config"].items() and source.note("test") in results["notes"]
    lines = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in lines} == {p.id for p in source.split("test")}
    controls = (tmp_path / "run" / "controls.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["id"] for line in controls} <= {p.id for p in source.split("test")}


def test_a_study_asks_them(tmp_path):
    path, grid = jsonl(tmp_path / "own.jsonl", map(row, range(40))), tmp_path / "grid.toml"
    declared = f'mode = "hook"\nproblems = "{path}"\nmax_new_tokens = 4\ndevice = "cpu"\n[grid]\nrank = [2]\n'
    grid.write_text(declared, encoding="utf-8")
    with one_thread():
        status, out, error = call("study", grid, "--out", tmp_path / "study")
    source = problem_source(path)
    assert (status, error) == (0, "") and source.note("test") in out
    assert f"test problems, {len(source.split('test'))} per language" in out
    declared = json.loads((tmp_path / "study" / "study.json").read_text(encoding="utf-8"))["declared"]
    assert source.record.items() <= declared.items() and declared["problems"] == "own.jsonl"
