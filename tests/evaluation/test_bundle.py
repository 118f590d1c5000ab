"""From a model to a bundle in one command; it is checked without the model, and every planted change is named."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from kernel_surgery.common.environment import PACKAGE
from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.bundle import BUNDLE, MANIFEST, RUN, check_bundle, differences, first_of_each
from kernel_surgery.reproduce import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small bundle of the embedded model."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    words = ["--model", "polyglot", "--out", str(out), "--problems", "1", "--controls", "haar:2"]
    assert run(words) == 0
    return out, words


@pytest.mark.slow
def test_the_bundle_holds_everything_and_checks_out_without_the_model(made, capsys, monkeypatch):
    out, words = made
    bundle = out / "bundle"
    names = {*BUNDLE, *RUN, MANIFEST, "controls.jsonl"}
    assert {p.name for p in bundle.iterdir()} == names
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert set(manifest["sha256"]) == names - {"manifest.json"} and manifest["environment"]["torch"]
    assert [c.split()[2] for c in manifest["commands"]] == [
        f"kernel_surgery.{name}" for name in ("collect", "fit", "bake", "verify", "eval")
    ]
    certificate = json.loads((bundle / "certificate.json").read_text())
    assert certificate["faults"] == [] and certificate["model"]["providers"]["baked"] == "weights on disk"
    assert "<h2>Certificate</h2>" in (bundle / "report.html").read_text()
    for file in [path for path in out.rglob("*") if path.is_file()]:
        for folder in (out, PACKAGE):
            assert str(folder).encode() not in file.read_bytes(), f"{file.relative_to(out)} names a folder"
    # Without the model: nothing is loaded.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    capsys.readouterr()
    assert run(["--check", str(bundle)]) == 0
    said = capsys.readouterr().out
    assert "every figure follows from the texts; checked by hash only: damage" in said
    # What is finished is not made again. A kill may have left the certificate's plot alone.
    monkeypatch.undo()
    (out / "certificate.json").unlink()
    before = {p: p.stat().st_mtime_ns for p in (out / "acts.safetensors", out / "eval" / "results.json")}
    assert run(words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (out / "certificate.json").exists()


def planted(bundle, name, change):
    """Change one file of a bundle, its hash with it."""
    file = bundle / name
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text())
    from kernel_surgery.files.hashing import sha256

    manifest["sha256"][name] = sha256(file)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def first_sample(change):
    def at(text):
        lines = text.split("\n")
        lines[0] = json.dumps(json.loads(lines[0]) | change, ensure_ascii=False)
        return "\n".join(lines)

    return at


def figure(change):
    def at(text):
        results = json.loads(text)
        change(results)
        return json.dumps(results)

    return at


def no_texts(results):
    results["modes"], results["paired"], results["expag_metrics"], results["power"] = {}, [], {}, []


CHANGES = {
    "no texts at all": (
        "samples.jsonl",
        lambda text: "",
        "fused en: there are no texts, but the configuration names them",
    ),
    "no figures": ("results.json", figure(no_texts), "is in only one of samples.jsonl and results.json"),
    "a mode that nobody ran": (
        "results.json",
        figure(lambda r: r["modes"].update(baked=r["modes"]["fused"])),
        "baked en: is in only one of samples.jsonl and results.json",
    ),
    "a FAT": ("samples.jsonl", first_sample({"fat_tokens": 1}), "fat_tokens was 1, is "),
    "tokens": ("samples.jsonl", first_sample({"tokens": [0]}), "text was "),
    "a power": (
        "results.json",
        figure(lambda r: r["power"][0].update(smallest_shown=0.001)),
        "results.json: power[0].smallest_shown is 0.001; the texts give ",
    ),
    "a control": (
        "results.json",
        figure(lambda r: r["controls"]["percentiles"]["en"]["accuracy"].update(p=0.001)),
        "results.json: controls.percentiles.en.accuracy.p is 0.001; the texts give ",
    ),
    "controls that are none": (
        "controls.jsonl",
        lambda text: "this is not even JSON",
        "does not hold the texts of the ",
    ),
    "a verdict": ("samples.jsonl", first_sample({"correct": False}), "correct was False, is True"),
    "a text": ("samples.jsonl", first_sample({"text": "The answer is -1."}), "extracted was "),
    "an answer": ("samples.jsonl", first_sample({"answer": -1}), "says the answer is -1, but it is "),
    "a prompt": ("samples.jsonl", first_sample({"prompt": "1 + 1?"}), "is not a problem of this test set"),
    "a text left out": (
        "samples.jsonl",
        lambda text: text.split("\n", 1)[1],
        "4 texts are not those of the 5 problems",
    ),
    "an accuracy": (
        "results.json",
        figure(lambda r: r["modes"]["fused"]["en"].update(accuracy=0.123)),
        "results.json: modes.fused.en.accuracy is 0.123; the texts give ",
    ),
    "a p-value": (
        "results.json",
        figure(lambda r: r["paired"][0].update(holm_p=0.001)),
        "results.json: paired[0].holm_p is 0.001; the texts give ",
    ),
    "a word": (
        "results.json",
        figure(lambda r: r["paired"][0].update(verdict="improved")),
        "results.json: paired[0].verdict is improved; the texts give no difference shown",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_strangers_bundle_is_made_again_from_its_texts_whatever_its_hashes_say(made, what, tmp_path, capsys):
    name, change, message = CHANGES[what]
    bundle = shutil.copytree(made[0] / "bundle", tmp_path / "bundle")
    planted(bundle, name, change)
    assert run(["--check", str(bundle)]) == 1
    said = capsys.readouterr().out
    assert any(line.startswith("fault: ") and message in line for line in said.splitlines()), said
    assert "SHA-256" not in said


@pytest.mark.slow
def test_a_changed_or_missing_file_is_named_by_its_hash(made, tmp_path):
    bundle = shutil.copytree(made[0] / "bundle", tmp_path / "bundle")
    (bundle / "report.html").write_text("better")
    (bundle / "certificate.svg").unlink()
    faults = check_bundle(bundle)
    assert faults == [
        "certificate.svg is missing",
        "report.html is not the file that was written (its SHA-256 differs from manifest.json)",
    ]
    (bundle / "samples.jsonl").unlink()
    assert check_bundle(bundle)[-1] == "without samples.jsonl nothing more can be checked"


@pytest.mark.slow
def test_the_folder_around_a_bundle_is_checked_too(made, capsys):
    assert run(["--check", str(made[0])]) == 0
    assert capsys.readouterr().out.startswith(f"{made[0] / 'bundle'}: every figure follows from the texts")


@pytest.mark.slow
def test_a_bundle_with_many_faults_names_each_kind_once(made, tmp_path):
    """Every verdict is turned: one sentence a mode and language, not one a text."""
    bundle = shutil.copytree(made[0] / "bundle", tmp_path / "bundle")

    def turned(text):
        lines = [json.loads(line) for line in text.split("\n") if line]
        changed = [line | {"correct": not line["correct"], "extracted": "-1"} for line in lines]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in changed)

    planted(bundle, "samples.jsonl", turned)
    faults = check_bundle(bundle)
    for field in ("correct", "extracted"):
        assert sum(f"{field} was " in fault for fault in faults) == 4, faults
        assert all(fault.endswith("(and 4 more texts)") for fault in faults if f"{field} was " in fault)
    assert len(faults) <= 12
    whole = shutil.copytree(made[0] / "bundle", tmp_path / "whole")

    def shifted(results):
        for by in results["modes"].values():
            for figures in by.values():
                figures |= {name: value + 1 for name, value in figures.items() if isinstance(value, int)}

    planted(whole, "results.json", figure(shifted))
    wrong = [fault for fault in check_bundle(whole) if "modes." in fault]
    assert len(wrong) == 1 and wrong[0].endswith("more figures)"), wrong


def test_faults_of_a_kind_are_counted():
    faults = [("a", "a is wrong"), ("b", "b is wrong"), ("a", "a is wrong too"), ("a", "and again")]
    assert first_of_each(faults, "texts") == ["a is wrong (and 2 more texts)", "b is wrong"]
    assert first_of_each([], "texts") == []


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a bundle from kernel_surgery\.reproduce"):
        run(["--check", str(tmp_path)])
    for words in ([], ["--out", "x"], ["--model", "polyglot"], ["--model", "polyglot", "--out", "x", "--check", "y"]):
        with pytest.raises(UserError, match="give --model and --out to make a bundle, or --check"):
            run(words)


def test_differences_are_named_where_they_are():
    made = {"a": [1, 2.0, {"b": None}], "c": "x"}
    assert differences("r", made, json.loads(json.dumps(made))) == []
    said = {"a": [1, 2.1, {"b": 0}], "d": 1}
    assert differences("r", made, said) == [
        "results.json: r.a[1] is 2.1; the texts give 2.0",
        "results.json: r.a[2].b is 0; the texts give None",
        "results.json: r.c is None; the texts give x",
        "results.json: r.d is 1; the texts give None",
    ]
    assert differences("r", [1], [1, 2]) == ["results.json: r is [1, 2]; the texts give [1]"]
    assert differences("r", 0.1 + 0.2, 0.3) == [] and differences("r", True, 1) == []
