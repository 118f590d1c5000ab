"""The tasks of lm-evaluation-harness, as far as they can be seen without it; tests/engines runs them in it."""

import json
import sys
from types import SimpleNamespace

import pytest
import yaml

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.evaluation.external import scored
from kernel_surgery.evaluation.options import Options
from kernel_surgery.lmeval import FOLDER, tasks
from kernel_surgery.problems.generator import problems


class Loader(yaml.SafeLoader):
    """Reads "!function module.name" as lm-eval does: from the file module.py in the same folder."""


def function(loader: Loader, node: yaml.Node):
    module, _, name = str(node.value).partition(".")
    assert module == "tasks", f"{FOLDER} has one module, tasks.py, and not {module}.py"
    return getattr(tasks, name)


Loader.add_constructor("!function", function)


def read(name: str) -> dict:
    """A YAML file of the folder, with the file that it includes below it."""
    held = yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader=Loader)
    return read(held.pop("include")) | held if "include" in held else held


def test_there_is_a_task_for_every_language_and_a_group_of_all():
    names = {path.name for path in FOLDER.glob("*.yaml")}
    assert names == {"common.yaml", "group.yaml", *(f"{language}.yaml" for language in LANGUAGES)}
    for language in LANGUAGES:
        task = read(f"{language}.yaml")
        assert task["task"] == f"kernel_surgery_{language}" and task["dataset_kwargs"] == {"language": language}
        assert task["custom_dataset"] is tasks.documents and task["process_results"] is tasks.verdicts
    group = read("group.yaml")
    assert group["group"] == "kernel_surgery"
    assert group["task"] == [f"kernel_surgery_{language}" for language in LANGUAGES]
    # Without a task or a group, lm-eval passes over the file.
    assert not {"task", "group"} & set(read("common.yaml"))


def test_the_text_is_generated_as_eval_does():
    task = read("en.yaml")
    options = task["generation_kwargs"]
    assert options["max_gen_toks"] == Options().budget
    assert options["until"] == [] and options["do_sample"] is False and options["repetition_penalty"] == 1
    assert (task["doc_to_text"], task["target_delimiter"], task["num_fewshot"]) == ("prompt", "", 0)


@pytest.fixture
def no_datasets(monkeypatch):
    """A list in the place of a `datasets.Dataset`, which lm-eval brings along."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_list=list)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_documents_are_evals_problems_in_its_order(no_datasets, language):
    rows = tasks.documents(language, version=1.0, pretrained="a model", seed=7)["test"]
    asked = problems("test", 40)
    assert [(row["id"], row["prompt"], row["answer"]) for row in rows] == [
        (problem.id, problem.prompts[language], str(problem.answer)) for problem in asked
    ]
    assert {row["language"] for row in rows} == {language} and len(rows) == 200
    assert len(tasks.documents(language, problems=2)["test"]) == 10


def test_the_documents_may_be_ones_own(no_datasets, tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [{"id": str(i), "answer": "1/2", "prompts": {"en": f" {{{{x}}}} {i}?\n"}} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows = tasks.documents("en", problems=str(file))["test"]
    asked = Options(problems=str(file), languages="en").asked().problems
    assert [row["prompt"] for row in rows] == [problem.prompts["en"] for problem in asked] and 0 < len(rows) < 40
    assert {row["answer"] for row in rows} == {"1/2"}
    with pytest.raises(UserError, match="has no prompt in 'zh'"):
        tasks.documents("zh", problems=str(file))


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The answer is 390.", "en", {"accuracy": 1.0, "coverage": 1.0, "language_fidelity": 1.0}),
        ("The answer is 391.", "en", {"accuracy": 0.0, "coverage": 1.0, "language_fidelity": 1.0}),
        ("The answer is 390.", "zh", {"accuracy": 1.0, "coverage": 1.0, "language_fidelity": 0.0}),
        ("390", "zh", {"accuracy": 1.0, "coverage": 0.0}),
        ("", "sw", {"accuracy": 0.0, "coverage": 0.0}),
    ],
)
def test_the_verdicts_are_those_of_score(text, language, expected):
    document = {"language": language, "prompt": "Work out 238 + 152.", "answer": "390"}
    assert tasks.verdicts(document, [text]) == expected
    line = scored(document | {"text": text})
    found = line["language_found"]
    assert (line["correct"], bool(found)) == (expected["accuracy"], expected["coverage"])
    assert [all(name == language for name in found)] * bool(found) == [
        expected[name] for name in ("language_fidelity",) if name in expected
    ]


def test_every_metric_is_declared_and_the_group_averages_those_over_all_texts():
    declared = [metric["metric"] for metric in read("en.yaml")["metric_list"]]
    document = {"language": "en", "prompt": "Work out 238 + 152.", "answer": "390"}
    assert set(declared) == set(tasks.verdicts(document, ["The answer is 390."]))
    always = set(tasks.verdicts(document, ["390"]))
    assert {metric["metric"] for metric in read("group.yaml")["aggregate_metric_list"]} == always
