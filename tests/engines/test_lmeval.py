"""lm-evaluation-harness asks what `eval` asks, and its figures are those of `score` on the same texts."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.evaluation.judging import score, text_of
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.summary import summarize
from kernel_surgery.lmeval import FOLDER
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from tests.support.ties import near_ties, noise_of_best, noise_of_padding

pytestmark = pytest.mark.engines

PER_CATEGORY = 2  # ten problems in each language
METRICS = ("accuracy", "language_fidelity", "coverage")
# Budgets at which polyglot's texts are cut off: some before their language can be judged, some before the answer.
SHORT = {4: "coverage", 48: "accuracy"}


@pytest.fixture(scope="module")
def model():
    return load_model("polyglot", torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture(scope="module")
def engines(named_vllm):
    """A function that loads polyglot in one of lm-eval's engines, once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = hf(POLYGLOT) if name == "hf" else vllm(POLYGLOT)
        return loaded[name]

    yield load
    if "vllm" in loaded:
        # Engines of later tests in this process need process groups of their own: a mixture has one more.
        loaded.pop("vllm").model.llm_engine.engine_core.shutdown()
        gc.collect()


def hf(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=32)


def vllm(folder):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(pretrained=str(folder), dtype="float32", enforce_eager=True, max_model_len=512)


def written(texts):
    """A model of lm-eval that has its texts from a function of the prompt."""
    from lm_eval.api.model import LM

    class Written(LM):
        def generate_until(self, requests):
            return [texts(request.args[0]) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Written()


def lm_eval(lm, asked=("kernel_surgery",), **options):
    """What lm-eval gives for our tasks: {"results", "samples", ...}."""
    import lm_eval as harness
    from lm_eval.tasks import TaskManager

    metadata = {"problems": PER_CATEGORY}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    return harness.simple_evaluate(
        model=lm, tasks=list(asked), task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )


def text(sample):
    ((answer,),) = sample["resps"]
    return answer


def line(sample):
    """A line for `score`: the prompt is the one that the engine was given."""
    ((prompt, _),) = sample["arguments"]
    return {"prompt": prompt, "text": text(sample)} | {key: sample["doc"][key] for key in ("answer", "language")}


def disagreements(given, folder):
    """Where lm-eval's verdicts and figures are not those of `python -m kernel_surgery.score`, a line for each."""
    from kernel_surgery.score import run

    found = []
    for language in LANGUAGES:
        name = f"kernel_surgery_{language}"
        if name not in given["samples"]:
            continue
        samples, file = given["samples"][name], folder / f"{language}.jsonl"
        file.write_text("".join(json.dumps(line(s)) + "\n" for s in samples), encoding="utf-8")
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as summary:
            assert run([str(file)]) == 0
        lines = [json.loads(row) for row in out.getvalue().splitlines()]
        for sample, scored in zip(samples, lines, strict=True):
            languages = scored["language_found"]
            ours = [scored["correct"], bool(languages)] + [languages == [language]] * bool(languages)
            theirs = [sample[key] for key in ("accuracy", "coverage", "language_fidelity") if key in sample]
            if ours != theirs:
                found.append(f"{sample['doc']['id']} in {language}: lm-eval {theirs}, score {ours}")
        figures, said = given["results"][name], summary.getvalue().splitlines()
        (shown,) = [row for row in said if row.startswith(f"{language}: ")]
        n, accuracy, coverage = len(samples), figures["accuracy,none"], figures["coverage,none"]
        fidelity = figures.get("language_fidelity,none")
        fidelity = "-" if fidelity is None else f"{fidelity:.3f}"
        begin = f"{round(accuracy * n)}/{n} right, {accuracy:.3f} ("
        end = f"language fidelity {fidelity}, judged {coverage:.3f}"
        if not (shown.startswith(f"{language}: {begin}") and shown.endswith(end)):
            found.append(f"{language}: lm-eval {begin}... {end}; score {shown}")
    return found


def values(given, metric):
    return {sample.get(metric) for samples in given["samples"].values() for sample in samples}


def prompts(given):
    return {name.rpartition("_")[2]: [line(s)["prompt"] for s in samples] for name, samples in given["samples"].items()}


def mixed(prompt):
    """Texts of every kind: right and wrong, in the language and in another, and without any language."""
    asked = {p.prompts[lang]: (i, p, lang) for i, p in enumerate(problems("test", PER_CATEGORY)) for lang in LANGUAGES}
    at, problem, language = asked[prompt]
    say = {"en": "The answer is", "zh": "所以答案是", "es": "La respuesta es", "sw": "Jibu la swali hili ni"}
    say |= {"ar": "الجواب هو", "ja": "答えは次のとおりです", "ko": "정답은 다음과 같습니다"}
    other = "en" if language == "ko" else "ko"
    value = problem.answer + (at % 5 == 1)
    return str(value) if at % 4 == 2 else f"{say[other if at % 3 == 1 else language]} {value}"


def test_figures_and_verdicts_are_those_of_score_for_texts_of_every_kind(tmp_path):
    given = lm_eval(written(mixed))
    assert disagreements(given, tmp_path) == []
    assert values(given, "accuracy") == values(given, "coverage") == {0, 1}
    assert values(given, "language_fidelity") == {0, 1, None}
    # The group's figures are over all texts.
    for metric in ("accuracy", "coverage"):
        every = [sample[metric] for samples in given["samples"].values() for sample in samples]
        assert given["results"]["kernel_surgery"][f"{metric},none"] == pytest.approx(sum(every) / len(every), abs=1e-12)
    assert "language_fidelity,none" not in given["results"]["kernel_surgery"]
    # Teeth: a verdict that was changed afterwards is seen.
    sample = given["samples"]["kernel_surgery_sw"][3]
    sample["accuracy"] = 1 - sample["accuracy"]
    assert [found.partition(":")[0] for found in disagreements(given, tmp_path)] == ["test-combinatorics-0001 in sw"]


def test_without_a_judged_text_there_is_no_fidelity(tmp_path):
    given = lm_eval(written(lambda prompt: "42"), ["kernel_surgery_ja"])
    assert disagreements(given, tmp_path) == []
    assert "language_fidelity,none" not in given["results"]["kernel_surgery_ja"]


def noise_of_vllm(lm, model, tokenizer, asked, own):
    """The largest difference of a log-probability between vLLM and transformers, over the five best of each token."""
    from vllm import SamplingParams

    def best_of(full):
        prompts = [{"prompt_token_ids": ids} for ids in full]
        outs = lm.model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=5), use_tqdm=False)
        return [[{t: held.logprob for t, held in (best or {}).items()} for best in out.prompt_logprobs] for out in outs]

    return noise_of_best(best_of, model, tokenizer, asked, own)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_an_engines_texts_are_evals_and_so_are_its_figures(engine, engines, model, tokenizer, tmp_path):
    """A text may differ only where the two best logits are closer than the rounding on both sides."""
    lm = engines(engine)
    given = lm_eval(lm)
    assert disagreements(given, tmp_path) == []
    asked = problems("test", PER_CATEGORY)
    assert prompts(given) == {language: [p.prompts[language] for p in asked] for language in LANGUAGES}
    ties, compared = 0, []
    for language in LANGUAGES:
        samples = given["samples"][f"kernel_surgery_{language}"]
        to_ask = [p.prompts[language] for p in asked]
        own = generate(model, tokenizer, to_ask, max_new_tokens=Options().budget)
        measure = noise_of_vllm if engine == "vllm" else lambda lm, *rest: noise_of_padding(lm.model, *rest)
        theirs = measure(lm, model, tokenizer, to_ask, own)
        print(f"{engine} {language}:", end=" ")
        found = near_ties(model, tokenizer, to_ask, own, [text(sample) for sample in samples], theirs)
        ties += found
        if not found:
            decode = text_of(tokenizer)
            cell = [score(p, language, "original", t, decode) for p, t in zip(asked, own, strict=True)]
            summary, figures = summarize(cell, Options().budget), given["results"][f"kernel_surgery_{language}"]
            assert [figures[f"{metric},none"] for metric in METRICS] == [summary[metric] for metric in METRICS]
            compared.append(language)
    print(f"{engine}: {ties} near ties in {len(LANGUAGES) * len(asked)} texts")
    assert compared, "no language without a near tie, so no figures were compared with eval's"


@pytest.mark.parametrize("budget", SHORT)
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_texts_that_are_cut_off_are_judged_as_score_does(engine, budget, engines, tmp_path):
    given = lm_eval(engines(engine), gen_kwargs={"max_gen_toks": budget})
    assert disagreements(given, tmp_path) == []
    assert values(given, SHORT[budget]) == {0, 1}


def test_a_checkpoints_own_penalty_does_not_reach_the_texts(engines, model, tokenizer, tmp_path):
    folder = shutil.copytree(POLYGLOT, tmp_path / "penalised")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 5.0}))
    task = ["kernel_surgery_en"]
    texts = [text(sample) for sample in lm_eval(hf(folder), task)["samples"][task[0]]]
    assert texts == [text(sample) for sample in lm_eval(engines("hf"), task)["samples"][task[0]]]
    # Teeth: where it is let in, it changes what the model writes.
    given = lm_eval(engines("hf"), task, gen_kwargs={"repetition_penalty": 5.0})
    assert texts != [text(sample) for sample in given["samples"][task[0]]]


def test_the_command_of_the_page_runs_and_limit_takes_the_first_problems(tmp_path):
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "32"]
    command += ["--model_args", f"pretrained={POLYGLOT},dtype=float32", "--tasks", "kernel_surgery_en"]
    command += ["--include_path", str(FOLDER), "--limit", "3", "--log_samples", "--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("samples_kernel_surgery_en_*.jsonl")
    samples = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
    asked = problems("test", 40)[:3]
    assert [(s["doc"]["id"], s["doc"]["prompt"]) for s in samples] == [(p.id, p.prompts["en"]) for p in asked]
    assert "|accuracy" in done.stdout and "|language_fidelity" in done.stdout
