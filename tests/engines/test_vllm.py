"""vLLM with the edit in every mode, beside transformers and the exact edit. It needs what `make engines` installs.

All engines run one after the other in this process, unless a test says otherwise: the next one then starts in seconds.
"""


import pytest
import torch

from kernel_surgery.certify.engine import MIXED, verify_engine
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.edit.modes import applied
from kernel_surgery.engines import offline
from kernel_surgery.engines.settings import KEY, PluginSettings
from kernel_surgery.engines.variants import ENGINE_MODES, Variant, variants
from kernel_surgery.evaluation.generate import end_tokens, generate
from kernel_surgery.evaluation.judging import score, text_of
from kernel_surgery.evaluation.run import evaluate
from kernel_surgery.models.chat import choose_chat
from kernel_surgery.models.load import (
    POLYGLOT,
    POLYGLOT_SUBSPACE,
    load_model,
)
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.artifact import Subspace
from tests.support.cells import store
from tests.support.engines import EAGER, FOLDERS, loaded, within

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("vllm_environment")]

# {model: (problems in each category, languages, tokens of a text)}
ASKED = {"polyglot": (4, "en,zh,sw", 96), "smollm2": (1, "en", 16)}


# --- log probabilities ---


@pytest.mark.parametrize("name", FOLDERS)
def test_every_mode_gives_the_exact_edits_log_probabilities(name, certificate):
    found = certificate(name)
    across = found["across_engines"]
    print(name, {mode: (r["rms"], r["rms_of_original"], r["max_of_original"]) for mode, r in across["modes"].items()})
    assert found["faults"] == [] and across["left_out"] == {}
    assert list(across["modes"]) == [*ENGINE_MODES, MIXED]
    # The edit itself is thousands of times what rounding makes, so a missing one cannot hide.
    assert across["effect_rms"] > 1000 * across["yardstick"]["rms"]
    for mode in ENGINE_MODES:
        store(name, mode, "loads", "yes")
        store(name, mode, "log probabilities", within(found, mode))
    within(found, MIXED)
    store(name, "lora", "mixed batch", "right")


# --- texts ---


@pytest.mark.parametrize("name", FOLDERS)
def test_eval_gives_the_texts_and_verdicts_of_transformers(name, subspaces, certificate, tmp_path):
    """A text may differ where the two best logits are closer than both engines' rounding: a near tie, which is counted.

    Each log probability of vLLM is off by at most what the certificate measured, and transformers' by the noise of a
    padded batch, which is taken as large. So two logits may change places if they are closer than twice both.
    """
    per_category, languages, budget = ASKED[name]
    given = {"model": name, "subspace": subspaces[name], "problems": per_category, "languages": languages}
    given |= {"max_new_tokens": budget, "dtype": "float32", "no_damage": True, "force": True}
    done = evaluate(engine="vllm", mode="all", engine_args='{"enforce_eager": true}', out=tmp_path / "run", **given)
    model, tokenizer = loaded(name)
    chat, subspace = choose_chat(name), Subspace.load(subspaces[name])
    asked, decode = problems("test", per_category), text_of(tokenizer, chat)
    across = certificate(name)["across_engines"]
    with variants(["baked"], FOLDERS[name], subspace) as (made, _):
        written = load_model(str(made["baked"].model), torch.float32)
    for mode in ENGINE_MODES:
        running = written if mode == "baked" else model
        noise = 2 * (2 * across["modes"][mode]["max"])
        ties = same = 0
        for language in languages.split(","):
            cell, to_ask = done.cells[mode, language], [p.prompts[language] for p in asked]
            with applied("original" if mode == "baked" else mode, running, subspace, 1.0, True):
                own = generate(running, tokenizer, to_ask, max_new_tokens=budget, chat=chat)
                for problem, text, sample in zip(asked, own, cell, strict=True):
                    if list(text.ids) == sample["tokens"]:
                        same += 1
                        assert score(problem, language, mode, text, decode) == sample
                        continue
                    ties += 1
                    prompt = chat.ids(tokenizer, problem.prompts[language])
                    assert gap(running, tokenizer, prompt, text.ids, sample["tokens"]) <= noise
        print(f"{name} {mode}: {same} texts are the same, {ties} near ties (gap at most {noise:.1e})")
        store(name, mode, "texts", f"{same} of {same + ties}" + (f", {ties} near ties" if ties else ""))
        assert same > ties
    # Teeth: another text is no near tie.
    first, second = (done.cells["original", languages.split(",")[0]][i]["tokens"] for i in (0, 1))
    assert first != second and gap(model, tokenizer, chat.ids(tokenizer, asked[0].prompts["en"]), first, second) > noise


def gap(model, tokenizer, prompt, own, other):
    """The difference of the two best logits at the token where two texts part."""
    ends = end_tokens(model, tokenizer)
    own, other = [*own, ends[0]], [*other, ends[0]]
    at = next(i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b)
    with torch.no_grad():
        best = model(torch.tensor([[*prompt, *own[:at]]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


# --- adapters ---


def test_one_slot_more_than_adapters_keeps_base_requests_unedited(certificate, monkeypatch):
    """On a CPU vLLM's LoRA operators read the last slot for a request without an adapter, so it must stay empty."""
    assert offline.SLOTS == offline.ADAPTERS + 1
    assert certificate("polyglot")["faults"] == []
    monkeypatch.setattr(offline, "SLOTS", offline.ADAPTERS)
    found = verify_engine(
        POLYGLOT, POLYGLOT_SUBSPACE, model_id="polyglot", dtype="float32", prompts=2, more=EAGER, edited=["lora"]
    )
    (fault,) = found["faults"]
    assert fault.startswith(f"{MIXED}: its log probabilities are off by ") and " at token " in fault


# --- the plugin ---


def polyglot_engine(settings=None, **more):
    variant = Variant("fused" if settings else "original", POLYGLOT, POLYGLOT, settings)
    return offline.started(variant, offline.EngineOptions(128, torch.float32, 1, EAGER | more))


PROMPT = [list(range(5, 25))]


def test_its_strength_changes_while_the_engine_runs():
    with polyglot_engine() as engine:
        original = engine.log_probabilities(PROMPT)[0]
        (stock,) = {
            type(module).__name__
            for module in engine.llm.llm_engine.model_executor.driver_worker.worker.get_model().modules()
            if "RowParallel" in type(module).__name__
        }
        assert stock == "RowParallelLinear"  # an engine that is not configured has vLLM's own layers
    with polyglot_engine(PluginSettings(POLYGLOT_SUBSPACE)) as engine:
        assert engine.report()["layers"] == [2, 3, 4, 5]
        edited = engine.log_probabilities(PROMPT)[0]
        offline.set_strength(engine.llm, 0.0)
        assert torch.equal(engine.log_probabilities(PROMPT)[0], original)
        offline.set_strength(engine.llm, 1.0)
        assert torch.equal(engine.log_probabilities(PROMPT)[0], edited) and not torch.equal(edited, original)
        with pytest.raises(Exception, match="must be a finite number"):
            offline.set_strength(engine.llm, float("nan"))
        assert engine.report()["strength"] == 1.0
        with pytest.raises(Exception, match="V2 model runner"):
            from vllm import SamplingParams

            engine.llm.generate(
                [{"prompt_token_ids": PROMPT[0]}], SamplingParams(extra_args={"kernel_surgery_strength": 0.5})
            )


@pytest.mark.parametrize(
    ("settings", "more", "words"),
    [
        (PluginSettings(POLYGLOT_SUBSPACE), {"enable_lora": True}, "LoRA cannot be combined"),
        (PluginSettings(POLYGLOT_SUBSPACE.with_name("nothing.safetensors")), {}, "no subspace at"),
        (PluginSettings(POLYGLOT_SUBSPACE, 1.0, (1, 2)), {}, r"layers \[1\] are not in the subspace"),
        (None, {"additional_config": {KEY: {"strength": 1}}}, '"subspace" is None'),
    ],
)
def test_what_would_be_a_silent_no_op_is_refused_at_start(settings, more, words):
    with pytest.raises(KernelSurgeryError, match=words), polyglot_engine(settings, **more):
        pass


def test_a_subspace_of_another_model_is_refused_when_the_weights_are_loaded(tmp_path):
    subspace = Subspace.load(POLYGLOT_SUBSPACE)
    samples = {name: [v + 1 for v in values] for name, values in subspace.fingerprint["samples"].items()}
    other = Subspace.of(
        subspace.projections, n_layers=8, fingerprint={"dtype": "bfloat16", "samples": samples}, model_id="another"
    )
    other.save(tmp_path / "other.safetensors")
    refused = pytest.raises(KernelSurgeryError, match=r"measured on other weights: model\.embed_tokens")
    with refused, polyglot_engine(PluginSettings(tmp_path / "other.safetensors")):
        pass
    with polyglot_engine(PluginSettings(tmp_path / "other.safetensors", force=True)) as engine:
        assert engine.report()["layers"] == [2, 3, 4, 5]


