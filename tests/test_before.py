"""Files that an earlier state of the code has written are still taken: tests/data/before, whose README says how."""

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest

import kernel_surgery
from kernel_surgery import Subspace
from tests.support.calls import call, one_thread

BEFORE = Path(__file__).resolve().parent / "data" / "before"


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy to work in: the files in the tree are never written to."""
    folder = shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(folder)
    with one_thread():
        yield folder


def lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1]


@pytest.mark.parametrize(
    "file, model, layers, rank",
    [
        ("subspace.safetensors", "example/pico", (1, 2), 4),
        ("bundle/subspace.safetensors", "polyglot", (2, 3, 4, 5), 10),
        ("study/chosen.safetensors", "polyglot", (2, 3, 4, 5), 2),
    ],
)
def test_a_subspace_loads_with_all_that_it_says(before, file, model, layers, rank):
    found = Subspace.load(before / file)
    assert (found.model_id, found.layers, found.rank) == (model, layers, rank)
    assert (found.site, found.pool, found.fit["split"]) == ("mlp_out", "last", "fit")
    assert found.means.keys() == found.spectrum.keys() == set(layers) and found.fingerprint["samples"]
    # Written again it is the same file: nothing of it was lost.
    found.save(before / "again.safetensors")
    assert (before / "again.safetensors").read_bytes() == (before / file).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ("--baked", "baked"),
        ("--baked", "baked", "--model", "model"),
        *[("--baked", "baked", "--model", "model", "--subspace", "subspace.safetensors", "--prompts", 2)],
        ("--adapter", "adapter"),
        ("--adapter", "adapter", "--model", "model"),
        ("--adapter", "adapter", "--model", "model", "--subspace", "subspace.safetensors"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_what_was_baked_and_the_adapter_are_verified(before, words):
    status, out, err = call("verify", *words, "--new-tokens", 1)
    whole = words[0] == "--baked" or "--model" in words
    said = "everything holds" if whole else "what can be checked without the original holds"
    assert (status, err) == (0, "") and f"2 edited layers (1, 2), rank 4, strength 1: {said}" in out
    # A byte that is another is found.
    file = next((before / words[1]).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)
    status, out, _ = call("verify", *words, "--new-tokens", 1)
    assert status == 1 and f"{file.name} is not the file that was written" in out


def test_an_edit_is_taken_back_from_its_record(before):
    status, out, err = call("bake", "--undo", "--model", "baked", "--out", "restored")
    assert (status, err) == (0, "") and "the edit of 2 tensors undone" in out
    for more in ((), ("--model", "model"), ("--model", "model", "--subspace", "subspace.safetensors")):
        status, out, err = call("verify", "--restored", "restored", *more)
        said = "everything holds" if more else "what can be checked without the original holds"
        assert (status, err) == (0, "") and said in out


def test_the_subspace_still_belongs_to_the_model(before):
    """Its fingerprint is compared, so the weights are read as they were when it was fitted."""
    words = ("--model", "model", "--subspace", "subspace.safetensors", "--no-damage", "--out")
    assert call("bake", *words, "again")[0] == 0 and call("lora", *words, "adapted")[0] == 0
    assert call("verify", "--baked", "again", "--model", "model")[0] == 0
    # What is no weight is the same file; only the card and the record name another model.
    for name in ("config.json", "generation_config.json"):
        assert (before / "again" / name).read_bytes() == (before / "baked" / name).read_bytes()
    status, _, err = call("bake", "--model", "baked", "--subspace", "subspace.safetensors", "--out", "no")
    assert status == 2 and "was baked before" in err


def test_a_bundle_checks_out_and_a_changed_text_does_not(before):
    status, out, err = call("reproduce", "--check", "bundle")
    assert (status, err) == (0, "") and "every figure follows from the texts" in out
    file = before / "bundle" / "samples.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"correct": true', '"correct": false', 1), "utf-8")
    status, out, _ = call("reproduce", "--check", "bundle")
    assert status == 1 and "correct was False, is True" in out and "its SHA-256 differs" in out


def test_activations_and_texts_are_read(before):
    acts = "study/activations-mlp_out-last.safetensors"
    given = ("--activations", acts, "--rank", 2, "--method", "deviations", "--out", "fitted.safetensors")
    status, out, err = call("fit", *given)
    assert (status, err) == (0, "") and "model  polyglot, layers 2-5 of 8, site mlp_out, d_model 128" in out
    assert "fit    deviations, rank 2, 5 problems" in out and "edit   orthogonal" in out
    status, out, err = call("score", "bundle/samples.jsonl")
    assert status == 0 and len(out.splitlines()) == 20 and err.startswith("original en: 5/5 right")


@pytest.mark.slow
def test_a_study_goes_on_with_the_choice_that_it_froze(before):
    study = before / "study"
    dev, test, frozen = (study / name for name in ("dev.jsonl", "test.jsonl", "frozen.json"))
    assert len(lines(test)) == 5 and not (study / "study.json").exists()
    kept, asked, said = dev.read_bytes(), test.read_bytes(), frozen.read_bytes()
    status, out, err = call("study", "grid.toml", "--out", "study")
    assert (status, err) == (0, "") and f"frozen: {json.loads(said)['sha256'][:16]}, one of 2 settings" in out
    # Texts are judged again by today's rules: a text that ends within a calculation has no answer now.
    assert frozen.read_bytes() == said and unjudged(dev.read_bytes()) == unjudged(kept)
    assert len(lines(test)) == 20 and unjudged(test.read_bytes())[:5] == unjudged(asked)
    made = json.loads((study / "study.json").read_text(encoding="utf-8"))
    assert made["frozen"] == json.loads(said) and len(made["dev"]) == 3 and len(made["test"]) == 2


def unjudged(samples: bytes) -> list[dict]:
    """What was generated, and whether it was right, without the value that was read from a wrong answer."""
    return [{k: v for k, v in json.loads(line).items() if k != "extracted"} for line in samples.splitlines()]


def now(run: Path) -> None:
    """Put the installed versions into a run's config.json: going on with other versions is refused, as it should be,
    and the files were written with those of their day."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert config["versions"].keys() == {"kernel_surgery", "torch", "transformers"}
    config["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    config["versions"]["kernel_surgery"] = kernel_surgery.__version__
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_cut_off(before):
    run = before / "run"
    words = ("--mode", "hook", "--problems", 1, "--max-new-tokens", 48, "--device", "cpu", "--out", "run", "--resume")
    more = ("--no-damage", "--certificate", "bundle/certificate.json")
    now(run)
    samples = run / "samples.jsonl"
    kept = lines(samples)
    assert len(kept) == 12 and not samples.read_bytes().endswith(b"\n")  # two cells, and part of a third
    status, out, err = call("eval", *words, *more)
    assert (status, err) == (0, "") and "no difference shown (n=5)" in out
    made = lines(samples)
    assert len(made) == 20 and made[:10] == kept[:10]
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["certificate"]["faults"] == []
    assert "<h2>Certificate</h2>" in (run / "report.html").read_text(encoding="utf-8")
    # Not with other options, and not with other versions.
    status, _, err = call("eval", *words, "--strength", 2)
    assert status == 2 and "strength was 1.0, now 2.0" in err
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["versions"]["torch"] = "0"
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    status, _, err = call("eval", *words)
    assert status == 2 and "versions was" in err
