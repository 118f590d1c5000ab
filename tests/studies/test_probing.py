"""probe measures the fitted edit and random ones alike: figures, verdict, files and pages, in any language."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernel_surgery import POLYGLOT_SUBSPACE, Subspace, collect_moments, fit_subspace, hooked
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES, RANDOM_EDITS
from kernel_surgery.damage.measure import neutral_moments, random_edits
from kernel_surgery.damage.neutral import NeutralText
from kernel_surgery.damage.words import HAAR, MATCHED, ratio_interval
from kernel_surgery.evaluation.controls import draw
from kernel_surgery.evaluation.effects import probe_accuracy
from kernel_surgery.evaluation.options import Asked
from kernel_surgery.models.load import load_model, load_tokenizer
from kernel_surgery.probe import _following, parser
from kernel_surgery.problems.generator import problems
from kernel_surgery.studies import probe_words
from kernel_surgery.studies.measuring import Measuring, first_problems
from kernel_surgery.studies.probe_page import page
from kernel_surgery.studies.probing import PROMPT_TOKENS, among, few_tokens, prompt_texts, text_of, verdict
from kernel_surgery.studies.randoms import KINDS, SEED, parse_kinds, random_subspaces
from kernel_surgery.subspace.reading import reading
from tests.support.browser import check_width
from tests.support.calls import call
from tests.support.neutral import fewer_sentences

ASKED = first_problems(problems("test", 40), 5)


@pytest.fixture(scope="module")
def model():
    return load_model("polyglot", torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture(scope="module")
def shipped():
    return Subspace.load(POLYGLOT_SUBSPACE)


@pytest.fixture(scope="module")
def few():
    """Four neutral sentences in each language: nothing here is about their number."""
    with pytest.MonkeyPatch.context() as patch:
        fewer_sentences(patch, 4)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, few):
    """A run on the embedded model: its folder, its words, and what was printed."""
    out = tmp_path_factory.mktemp("probe") / "run"
    words = ["--out", out, "--device", "cpu", "--probed", "5", "--languages", "en,zh,ja", "--strength", "0.5"]
    words += ["--controls", "haar:2,energy:1"]
    return out, words, call("probe", *words)


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "probe.json").read_text(encoding="utf-8"))


# --- what is measured ---


def test_the_figures_are_those_of_one_edit_measured_alone(run, results, model, tokenizer, shipped):
    languages = ("en", "zh", "ja")
    about = (model, tokenizer, languages, ASKED, languages, [2, 3, 4, 5], "hook", "test")
    measuring = Measuring(*about, streams=[5, 7], force=True)
    half = Subspace.of(shipped.projections, strengths=dict.fromkeys([2, 3, 4, 5], 0.5))
    expected = json.loads(json.dumps(measuring.figures(measuring.measure(half))))
    made = results["measured"]["edit"]
    assert {name: made[name] for name in expected} == expected
    assert results["asked"] == json.loads(json.dumps(measuring.asked_of())) | {
        **{"site": "mlp_out", "streams": [5, 7], "text": "neutral", "sentences": 4},
        "worded_as_fitted": 0.0,
    }


def test_the_probe_reads_the_residual_stream_too(results, model, tokenizer, shipped):
    rows, labels, groups = [], [], []

    def take(layer, states, mask):
        rows.append(states[0, 1:])

    with hooked(model, shipped, 0.5), reading(model, tokenizer, [7], "resid_post", take) as read:
        for group, problem in enumerate(ASKED):
            for label, language in enumerate(("en", "zh", "ja")):
                ids = list(tokenizer(problem.prompts[language]).input_ids)
                read([ids])
                labels += [label] * (len(ids) - 1)
                groups += [group] * (len(ids) - 1)
    expected = probe_accuracy(torch.cat(rows), torch.tensor(labels), torch.tensor(groups))
    made = results["measured"]["edit"]["streams"]["7"]
    print(f"one by one {expected:.4f}, batched {made:.4f}")
    # Batched with padding, an activation differs by a rounding, which may turn a token or two.
    assert abs(made - expected) <= 2 / len(labels) and made != results["measured"]["original"]["streams"]["7"]
    low, high = results["measured"]["edit"]["streams_ci95"]["7"]
    assert low <= made <= high


def test_a_run_goes_on_and_may_be_asked_for_more_random_edits(run, results, monkeypatch):
    out, words, _ = run
    counted, measure = [], Measuring._read
    monkeypatch.setattr(Measuring, "_read", lambda self, edited: counted.append(1) or measure(self, edited))
    assert call("probe", *words)[0] == 2 and not counted
    more = [*words[:-1], "haar:3,energy:1", "--resume"]
    status = call("probe", *more)[0]
    again = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert status == 0 and len(counted) == 2, "the original's means, and the new edit alone"
    assert {name: again["measured"][name] for name in results["measured"]} == results["measured"]
    assert set(again["measured"]) - set(results["measured"]) == {"haar:2"}
    # One that is not asked for again stays: nobody chooses the random edits by their result.
    assert call("probe", *words[:-1], "energy:1", "--resume")[0] == 0 and len(counted) == 2
    last = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert list(last["measured"]) == list(again["measured"]) and last["controls"] == {"haar": 3, "energy": 1}
    status, _, error = call("probe", *more, "--seed", "1")
    assert status == 2 and "seed was 0, now 1" in error


def test_what_is_printed_has_the_figures_and_the_next_command(run, results):
    status, said, _ = run[2]
    edit, original = results["measured"]["edit"], results["measured"]["original"]
    assert status == 0 and said.startswith(probe_words.sentence(results) + "\n")
    for figure in (
        f"{edit['probe']:.3f} (",
        f"without the edit {original['probe']:.3f}",
        f"KL {edit['damage']:.3g} nats",
    ):
        assert figure in said
    assert "2 random uniform" in said and "1 random of equal energy" in said
    assert "next: python -m kernel_surgery.eval --mode fused --model polyglot --strength 0.5" in said
    assert len(re.findall(r"^  [2-5]  ", said, re.MULTILINE)) == 4, "a row for each edited layer"


@pytest.mark.parametrize("broken", [True, False])
def test_an_edit_that_breaks_the_model_is_not_passed_on_in_silence(broken):
    args = parser().parse_args(["--out", "x", "--strength=-1", "--force"])
    following = _following(args, broken=broken, rank=2)
    assert following.note.startswith("Try fewer layers or a lower rank") == broken
    assert _following(args, broken=broken, rank=1).note.startswith("Try fewer layers (fit --layers)") == broken
    assert following.words[-2:] == ["--strength=-1", "--force"]
    found = planted(0.5, word="broken" if broken else "like 4-bit")
    assert probe_words.sentence(found).endswith(" It breaks the model in en, zh (of 3 languages).") == broken
    found["measured"]["edit"]["words"]["sw"] = found["measured"]["edit"]["word"]
    assert probe_words.sentence(found).endswith(" It breaks the model in all 3 languages.") == broken


def test_a_subspace_of_unknown_origin_needs_force(shipped, few, tmp_path):
    Subspace(shipped.bases).save(tmp_path / "bare.safetensors")
    words = [
        "--subspace",
        tmp_path / "bare.safetensors",
        "--languages",
        "en,zh",
        "--probed",
        "5",
        "--controls",
        "haar:1",
    ]
    words += ["--device", "cpu", "--out", tmp_path / "run"]
    status, _, error = call("probe", *words)
    assert status == 2 and "--force" in error and not (tmp_path / "run").exists()
    assert call("probe", *words, "--force")[0] == 0


# --- any language ---


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Problems in German and French, of which about a fifth is in the test split."""
    file = tmp_path_factory.mktemp("problems") / "own.jsonl"
    lines = [
        {"id": str(i), "answer": i + 2, "prompts": {"de": f"Was ist {i} plus 2?", "fr": f"Combien font {i} et 2 ?"}}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_languages_without_neutral_text_are_measured_on_the_prompts(foreign, tmp_path, model, tokenizer):
    words = ["--problems", foreign, "--controls", "haar:1", "--device", "cpu", "--out", tmp_path / "run"]
    status, said, error = call("probe", *words)
    assert status == 0, error
    made = json.loads((tmp_path / "run" / "probe.json").read_text(encoding="utf-8"))
    assert made["asked"]["languages"] == ["de", "fr"] and made["asked"]["text"] == "prompts"
    assert set(made["measured"]["edit"]["kl"]) == {"de", "fr"}
    assert made["measured"]["edit"]["damage"] > 0 == made["measured"]["original"]["damage"]
    assert made["config"]["problems_file"] == "own.jsonl" and "prompts in each" in said
    notes = " ".join(made["notes"])
    assert "prompts of the problems in each language, not on everyday text" in notes and "are worded as" not in notes
    assert "next: python -m kernel_surgery.compare --mode fused --model polyglot 'A PROMPT IN YOUR LANGUAGE'" in said
    status, _, error = call("probe", *words[:-1], tmp_path / "other", "--text", "neutral")
    assert status == 2 and "there is no neutral text in 'de'" in error and not (tmp_path / "other").exists()


def test_prompts_that_are_worded_as_those_of_the_fit_are_counted_where_the_fit_is_of_that_file(foreign, tmp_path):
    for stage, *words in (
        ("collect", "--problems", foreign, "--out", tmp_path / "acts.safetensors"),
        ("fit", "--activations", tmp_path / "acts.safetensors", "--out", tmp_path / "own.safetensors"),
    ):
        status, out, error = call(stage, *words)
        assert status == 0, error
    # Answers are judged in neither language: the next command is not eval.
    assert "next: python -m kernel_surgery.probe --model polyglot --subspace" in out and "--problems own.jsonl" in out
    words = ["--problems", foreign, "--subspace", tmp_path / "own.safetensors", "--controls", "haar:1"]
    assert call("probe", *words, "--device", "cpu", "--out", tmp_path / "run")[0] == 0
    made = json.loads((tmp_path / "run" / "probe.json").read_text(encoding="utf-8"))
    prompts = 2 * made["asked"]["problems"]
    said = f"{prompts} of the {prompts} prompts of the test split are worded as prompts that the subspace was fitted on"
    assert any(note.startswith(said) for note in made["notes"]), made["notes"]
    assert made["asked"]["worded_as_fitted"] == 1.0


def test_what_the_damage_is_measured_on():
    assert text_of(None, ["en", "zh"]) == "neutral" and text_of(None, ["en", "de"]) == "prompts"
    assert text_of("prompts", ["en"]) == "prompts" and text_of("neutral", ["sw"]) == "neutral"
    with pytest.raises(UserError, match="there is no neutral text in 'de'"):
        text_of("neutral", ["en", "de"])


def test_as_many_prompts_are_read_as_the_neutral_text_has_tokens(tokenizer):
    asked = Asked(tuple(problems("test", 40)), ("en", "ko"), {}, None)
    texts = prompt_texts(tokenizer, asked)
    counts = {lang: sum(len(tokenizer(text).input_ids) for text in by) for lang, by in texts.items()}
    fewer = {lang: sum(len(tokenizer(text).input_ids) for text in by[:-1]) for lang, by in texts.items()}
    print(counts)
    assert min(fewer.values()) < PROMPT_TOKENS <= min(counts.values())
    assert texts["ko"] == [p.prompts["ko"] for p in asked.problems[: len(texts["en"])]]
    long = [SimpleNamespace(prompts={"en": "word " * 2000}) for _ in range(3)]
    assert len(prompt_texts(tokenizer, Asked(tuple(long), ("en",), {}, None))["en"]) == 2


# --- random edits ---


@pytest.fixture(scope="module")
def text(model, tokenizer, few):
    return NeutralText(model, tokenizer, ("en", "zh"))


@pytest.fixture(scope="module")
def scheduled(shipped):
    return shipped.truncate(3).at_strength(0.5)


def test_every_kind_has_the_rank_the_layers_and_the_site(text, scheduled):
    made = random_subspaces(text, scheduled, dict.fromkeys(KINDS, 2))
    assert list(made) == [f"{kind}:{i}" for kind in KINDS for i in range(2)]
    drawn = {name: make() for name, make in made.items()}
    for name, edit in drawn.items():
        assert (edit.rank, edit.layers, edit.edited_site) == (3, scheduled.layers, "mlp_out"), name
        if not name.startswith("energy"):
            assert edit.strengths == scheduled.strengths
    bases = [edit.bases[3] for edit in drawn.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(bases) for b in bases[:i]), "all are drawn apart"
    # The same as those of a study and of eval.
    assert torch.equal(drawn["haar:1"].bases[3], random_edits(text, scheduled, HAAR, 1).bases[3])
    assert torch.equal(drawn["matched:1"].bases[3], random_edits(text, scheduled, MATCHED, 1).bases[3])
    controls = draw("pca", 2, scheduled, 1.0, neutral_moments(text, scheduled), SEED)
    assert torch.equal(drawn["pca:1"].bases[3], controls[1].bases[3])


def test_an_edit_of_equal_energy_takes_as_much_as_the_fitted_one(text, scheduled):
    moments = neutral_moments(text, scheduled)
    edit = random_subspaces(text, scheduled, {"energy": 1})["energy:0"]()
    for layer, found in moments.items():
        fitted = scheduled.strengths[layer] ** 2 * found.energy(scheduled.projections[layer])
        random = edit.strengths[layer] ** 2 * found.energy(edit.projections[layer])
        assert random == pytest.approx(fitted, rel=1e-5)  # the basis is stored in float32


def test_random_edits_of_the_site_after_a_norm_are_drawn_from_what_is_there(monkeypatch):
    sites = []

    def read(*words):
        sites.append(words[3])
        raise StopIteration

    monkeypatch.setattr("kernel_surgery.damage.measure.reading", read)
    bases = {1: torch.eye(8)[:, :2]}
    for site in ("mlp_write", "mlp_out", "resid_post", None):
        with pytest.raises(StopIteration):
            neutral_moments(SimpleNamespace(model=None, tokenizer=None), Subspace(bases, site=site))
    assert sites == ["mlp_write", "mlp_out", "mlp_out", "mlp_out"]


@pytest.mark.parametrize("bad", ["", "haar", "haar:0", "haar:x", "gauss:3", "haar:2,haar:3", "haar:2,,"])
def test_controls_are_kinds_with_numbers(bad):
    with pytest.raises(UserError, match="--controls takes kinds with numbers, such as energy:5,matched:5"):
        parse_kinds(bad)
    assert parse_kinds(RANDOM_EDITS) == {"energy": 5, "matched": 5} and parse_kinds("pca:3, energy:1") == {
        "pca": 3,
        "energy": 1,
    }


# --- what may be said ---


def test_an_edit_fitted_on_these_very_tokens_hides_more_than_random_ones_and_a_random_one_does_not(
    model, tokenizer, few, tmp_path
):
    """Planted: an affine edit of the means of what the probe is asked. And a random edit in its place."""
    asked = first_problems(problems("test", 40), 10)
    moments = collect_moments(model, tokenizer, asked, LANGUAGES, "2-5")
    said = {}
    for name, subspace in (("fitted", fit_subspace(moments)), ("random", None)):
        if subspace is None:
            subspace = random_subspaces(None, said["fitted"][1], {"haar": 12})["haar:11"]()
        subspace.save(tmp_path / f"{name}.safetensors")
        words = ["--subspace", tmp_path / f"{name}.safetensors", "--controls", "haar:1,matched:1", "--probed", "10"]
        status, _, error = call("probe", *words, "--out", tmp_path / name, "--force", "--device", "cpu")
        assert status == 0, error
        said[name] = json.loads((tmp_path / name / "probe.json").read_text(encoding="utf-8"))["verdict"], subspace
    assert said["fitted"][0] == probe_words.MORE and said["random"][0] != probe_words.MORE
    # Scaled edits alone say nothing of hiding.
    words = ["--subspace", tmp_path / "fitted.safetensors", "--controls", "energy:1", "--probed", "10", "--force"]
    status, printed, _ = call("probe", *words, "--out", tmp_path / "scaled", "--device", "cpu")
    assert status == 0 and "No random edit that takes directions away was measured" in printed.splitlines()[0]
    found = json.loads((tmp_path / "scaled" / "probe.json").read_text(encoding="utf-8"))
    assert found["verdict"] == probe_words.UNCOMPARED


def test_a_verdict_needs_intervals_below_zero_and_enough_problems():
    below, across, above = [-0.2, -0.3, -0.1], [-0.2, -0.3, 0.0], [0.1, 0.05, 0.2]
    assert verdict(below, [below], 10) == probe_words.MORE and verdict(below, [below], 9) == probe_words.FEW
    assert verdict(below, [below], 9, unread=True) == verdict(below, [below], 10, unread=True) == probe_words.UNREAD
    assert verdict(below, [below, below], 10) == probe_words.MORE
    assert verdict(below, [], 10) == probe_words.UNCOMPARED, "nothing that takes directions away beside it"
    assert verdict(below, [below, across], 10) == verdict(below, [above], 10) == probe_words.NO_MORE
    assert verdict(across, [below], 10) == verdict(above, [below], 10) == probe_words.NOTHING


def test_with_fewer_problems_the_intervals_would_be_too_narrow():
    """How often an interval of differences that are nothing lies below 0. It should be .025."""
    generator = np.random.default_rng(0)

    def rate(problems):
        draws = (generator.normal(size=problems) for _ in range(200))
        return np.mean([ratio_interval(draw, np.ones(problems))[1] < 0 for draw in draws])

    few, enough = rate(4), rate(probe_words.PROBLEMS)
    noise = 2 * (0.05 * 0.95 / 200) ** 0.5  # of a rate of .05 in 200 draws
    print(f"4 problems {few:.3f}, {probe_words.PROBLEMS} problems {enough:.3f}")
    assert few > 0.05 + noise and enough <= 0.05 + noise


def test_where_a_figure_lies_among_random_ones():
    assert among(0.1, [0.5, 0.7, 0.3]) == {"low": 0.3, "high": 0.7, "n": 3, "as_low": 0, "p": 0.25}
    assert among(0.5, [0.5, 0.7, 0.3])["as_low"] == 2 and among(0.9, [0.5])["p"] == 1


BELOW, ACROSS = [-0.2, -0.3, -0.1], [-0.2, -0.3, 0.1]


def planted(edit, original=0.9, chance=0.1, verdict=probe_words.MORE, haar=BELOW, matched=BELOW, word="like 4-bit"):
    """What is said of: an edit's accuracy, the original's, and intervals beside random edits of two kinds.

    Those of equal energy are there too, and take no direction away, so nothing is said of them.
    """
    kl = {"en": 0.1, "sw": 2.0, "zh": 0.3}
    # The language with the largest KL need not be one of those that have the word.
    words = {"en": word, "sw": "worse than 4-bit", "zh": word}
    measured = {"original": {"probe": original}, "edit": {"probe": edit, "kl": kl, "word": word, "words": words}}
    beside = {"haar": {"probe": {"n": 5, "p": 1 / 6}}, "matched": {"probe": {"n": 4, "p": 0.2}}}
    return {
        **{"measured": measured, "asked": {"chance": chance, "problems": 4}, "verdict": verdict, "beside": beside},
        "difference": {"original": BELOW, "haar:3": haar, "matched:0": matched, "energy:1": BELOW},
    }


def test_the_share_that_is_hidden_is_of_what_is_read_above_chance():
    assert probe_words.hidden(planted(0.5)) == pytest.approx(0.5) and probe_words.hidden(planted(0.1)) == 1
    assert probe_words.hidden(planted(0.9)) == 0 == probe_words.hidden(planted(0.05, original=0.1))
    assert probe_words.hidden(planted(0.05)) == 1, "below chance, nothing more is hidden"
    shares = {0.0087: "0.9%", 0.0994: "9.9%", 0.0996: "10%", 1.0: "100%", 0.0: "0.0%"}
    assert {share: probe_words.percent(share) for share in shares} == shares


def test_a_verdict_says_that_the_wordings_were_those_of_the_fit_and_that_nothing_was_compared():
    found = planted(0.5)
    assert probe_words.sentence(found).startswith("This edit hides 50% ")
    for share, said in ((0.4, "This edit"), (0.5, "On wordings that it was fitted on, this edit")):
        found["asked"]["worded_as_fitted"] = share
        assert probe_words.sentence(found).startswith(f"{said} hides 50% ")
    found["verdict"] = probe_words.UNCOMPARED
    assert probe_words.sentence(found).endswith("No random edit that takes directions away was measured beside it.")


def test_the_damage_names_the_language_that_has_the_word_and_the_largest():
    found = planted(0.5, word="broken")
    found["measured"]["edit"]["damage"] = 2.0
    found |= {"yardsticks": {"4-bit": {"sw": 0.5}}}
    found["beside"]["all"] = {"damage": {"low": 0.1, "high": 0.2}}
    assert probe_words.damage_words(found) == (
        "broken in en, zh (of 3 languages): KL 0.3 nats per token in zh; largest KL 2 nats per token, in sw; random "
        "edits 0.1 to 0.2, 4-bit weights 0.5"
    )
    found["measured"]["edit"]["words"] = dict.fromkeys(("en", "sw", "zh"), "broken")
    assert probe_words.damage_words(found).startswith("broken in all 3 languages: largest KL 2 nats per token, in sw;")


def test_every_verdict_has_its_sentence_with_the_kinds_of_random_edits_and_their_p():
    said = "This edit hides 50% of what a linear probe reads of the language above chance. "
    haar, matched = "5 uniform (p = 0.17)", "4 by covariance (p = 0.20)"
    more, not_more = (
        "That is more than these random edits of its rank hide: ",
        "It is not shown to be more than these hide: ",
    )
    assert probe_words.sentence(planted(0.5)) == f"{said}{more}{haar}, {matched}."
    some, none = (probe_words.sentence(planted(0.5, haar=x, matched=ACROSS)) for x in (BELOW, ACROSS))
    assert some == f"{said}{more}{haar}. {not_more}{matched}." and none == f"{said}{not_more}{haar}, {matched}."
    alone = planted(0.5, verdict=probe_words.UNCOMPARED)
    alone["difference"] = {"original": BELOW, "energy:1": BELOW}
    assert probe_words.sentence(alone) == f"{said}No random edit that takes directions away was measured beside it."
    other = {
        word: probe_words.sentence(planted(0.5, verdict=word))
        for word in (probe_words.NOTHING, probe_words.UNREAD, probe_words.FEW)
    }
    assert other[probe_words.NOTHING] == "This edit is not shown to hide anything of the language from a linear probe."
    assert other[probe_words.FEW].startswith("4 problems are too few to say how much")
    assert (
        "so there is nothing to hide" in other[probe_words.UNREAD]
        and "and chance is 0.100" in other[probe_words.UNREAD]
    )


def test_random_edits_that_are_too_few_are_called_so(results):
    assert "it takes 19 of a kind to show p = 0.05" in probe_words.rank_words(results)
    enough = {"probe": {"n": 19, "as_low": 0, "p": 0.05}}
    assert "it takes" not in probe_words.rank_words({"beside": {"all": {}, "haar": enough}})


def test_a_run_of_few_problems_says_so_first(run, results):
    assert results["asked"]["problems"] == 5 and results["verdict"] == probe_words.FEW
    assert run[2][1].startswith("5 problems are too few")


def test_a_probe_that_has_few_tokens_to_learn_from_is_called_so(results):
    assert few_tokens({"tokens": 500}, 100) == []
    (said,) = few_tokens({"tokens": 499}, 100)
    assert "499 tokens to learn from for 100 features" in said and "--probed" in said
    assert results["notes"][-1:] == few_tokens(results["asked"], 128) != []


def test_differences_are_from_the_random_edit_of_each_kind_that_hides_most(results, run):
    measured = results["measured"]
    lowest = min(("haar:0", "haar:1"), key=lambda name: measured[name]["probe"])
    assert list(results["difference"]) == ["original", lowest, "energy:0"]
    for name, (value, low, high) in results["difference"].items():
        assert value == pytest.approx(measured["edit"]["probe"] - measured[name]["probe"]) and low <= value <= high


# --- the page ---


def test_the_page_is_one_file_that_fetches_nothing(run, results):
    made = (run[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="?https?:', made) and made.count("<svg xmlns") == 3
    assert "Is it the language? polyglot" in made and "than without an edit" in made
    assert probe_words.sentence(results) in page(results)
    assert "Each edit, in each language" in made and "random of equal energy 0" in made


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_not_wider_than_the_screen(results, tmp_path, width):
    text = page(results)
    check_width(tmp_path / "page.html", text, width, 3)
