"""Texts made elsewhere: what goes in comes out with verdicts, and what is wrong with a file is said by line."""

import json
import math
import os
import subprocess
import sys

import pytest

from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.external import agreement
from kernel_surgery.score import run

LINES = [
    {"text": "So the answer is 390.", "answer": 390, "language": "en", "prompt": "What is 238 + 152?", "mine": [1]},
    {"text": "La respuesta es 1.234.", "answer": "1234", "language": "es"},
    {"text": "The answer is 5/2.\u2028Yes.", "answer": 2.5, "language": "sw", "prompt": ""},
    {"text": "不知道。", "answer": 7, "language": "zh", "prompt": "3 + 4?"},
]


def written(tmp_path, lines):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    return path


def test_lines_come_out_as_they_went_in_with_three_fields_more(tmp_path, capsys):
    assert run([str(written(tmp_path, LINES))]) == 0
    out, err = capsys.readouterr()
    made = [json.loads(line) for line in out.split("\n") if line]
    assert [{k: line[k] for k in given} for line, given in zip(made, LINES, strict=True)] == LINES
    assert all(
        set(line) - set(given) == {"extracted", "correct", "language_found"}
        for line, given in zip(made, LINES, strict=True)
    )
    assert [line["extracted"] for line in made] == ["390", "1234", "5/2", None]
    assert [line["correct"] for line in made] == [True, True, True, False]
    assert [line["language_found"] for line in made] == [["en"], ["es"], ["en"], ["zh"]]
    assert "en: 1/1 right" in err
    assert "sw: 1/1 right, 1.000 (0.207 to 1.000), language fidelity 0.000, judged 1.000" in err


def test_samples_of_an_evaluation_get_the_verdicts_they_had(tmp_path, capsys):
    """samples.jsonl goes in as it is."""
    sample = {
        "text": "The answer is 12.",
        "answer": 12,
        "language": "en",
        "prompt": "5 + 7?",
        "correct": None,
        "id": "a",
    }
    run([str(written(tmp_path, [sample]))])
    assert json.loads(capsys.readouterr().out)["correct"] is True


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken\n", r"line 2 is not JSON"),
        ("[1]\n", r"line 2 is a list, not an object"),
        ({"answer": 1, "language": "en"}, r"line 2: 'text' is missing. It must be a string"),
        ({"text": "x", "language": "en"}, r"line 2: 'answer' is missing. It must be a number"),
        ({"text": "x", "answer": True, "language": "en"}, r"line 2: 'answer' is true. It must be a number"),
        ({"text": "x", "answer": "many", "language": "en"}, r"line 2: answer 'many' is not a number"),
        ({"text": "x", "answer": "1/0", "language": "en"}, r"line 2: answer '1/0' is not a number"),
        ({"text": "x", "answer": "1e99999999", "language": "en"}, r"line 2: answer '1e99999999' is not a number"),
        ({"text": "x", "answer": "1e-99999999", "language": "en"}, r"line 2: answer '1e-99999999' is not a number"),
        ({"text": "x", "answer": 1, "value": "abc", "language": "en"}, r"line 2: value 'abc' is not a number"),
        ({"text": "x", "answer": 1, "value": float("inf"), "language": "en"}, r"line 2: value inf is not a number"),
        ({"text": "x", "answer": 1, "prompt": 5, "language": "en"}, r"line 2: 'prompt' is 5, not a string"),
        ({"text": "x", "answer": 1, "language": "fr"}, r"line 2: unknown language 'fr'; known: zh, en"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_printed(tmp_path, line, message, capsys):
    with pytest.raises(UserError, match=message):
        run([str(written(tmp_path, [LINES[0], line]))])
    assert capsys.readouterr().out == ""


def test_half_a_character_is_replaced_and_separators_are_read(tmp_path, capsys):
    odd = {"text": "The answer is \ud800 1234.", "answer": "1,234", "language": "en"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")  # as \\ud800, which is JSON
    assert run([str(tmp_path / "odd.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["correct"] is True and found["text"] == "The answer is ? 1234." and "prompt" not in found
    nothing = LINES[0] | {"text": "No number.", "correct": False, "value": None}
    agreed = agreement([nothing])
    assert math.isnan(agreed.precision) and math.isnan(agreed.recall)


def test_half_a_character_in_any_field_is_replaced(tmp_path, capsys):
    odd = LINES[0] | {"id": "\ud800", "more": [{"\udfff": ["\ud801", 1]}], "mode": "\ud802"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(odd) + "\n")
    assert run([str(tmp_path / "odd.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["id"] == "?" and found["more"] == [{"?": ["?", 1]}] and found["mode"] == "?"


@pytest.mark.parametrize("locale", ["C", "POSIX", "cp1252"])
def test_the_output_is_utf_8_whatever_the_locale(tmp_path, locale):
    line = LINES[3] | {"prompt": "صفر؟"}
    path = written(tmp_path, [line])
    settings = {"PYTHONIOENCODING": "cp1252"} if locale == "cp1252" else {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, "PYTHONUTF8": "0", **settings}
    done = subprocess.run(
        [sys.executable, "-m", "kernel_surgery.score", str(path)], env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout.decode("utf-8"))["prompt"] == "صفر؟" and "不知道。".encode() in done.stdout


def test_the_original_and_the_edited_model_are_counted_apart(tmp_path, capsys):
    """The lines of samples.jsonl carry the mode: half right in all, all right with one and none with the other."""
    right = LINES[0] | {"mode": "original"}
    wrong = LINES[0] | {"mode": "fused", "text": "The answer is 391."}
    assert run([str(written(tmp_path, [right, wrong, right, LINES[0]]))]) == 0
    *rows, _, following = capsys.readouterr().err.splitlines()
    assert following.startswith("next: ")
    assert [row.partition(" right,")[0] for row in rows] == ["original en: 2/2", "fused en: 0/1", "en: 1/1"]


def test_an_empty_file_is_no_result(tmp_path):
    with pytest.raises(UserError, match="holds no lines"):
        run([str(written(tmp_path, ["\n"]))])
    with pytest.raises(FileNotFoundError):
        run([str(tmp_path / "none.jsonl")])


def test_labels_must_be_there_and_agree_with_themselves(tmp_path, capsys):
    right = LINES[0] | {"correct": True, "value": "390"}
    wrong = LINES[0] | {"text": "The answer is 391.", "correct": False, "value": "391"}
    missed = LINES[0] | {"text": "No number at all.", "correct": True, "value": "390"}
    assert run([str(written(tmp_path, [right, right, wrong, missed])), "--labels"]) == 0
    found = agreement([right, right, wrong, missed])
    assert (found.n, found.called_right, found.are_right, found.both, found.same_value) == (4, 2, 3, 2, 3)
    assert (found.precision, found.recall) == (1.0, 2 / 3) and "1.000  0.667" in capsys.readouterr().out
    with pytest.raises(UserError, match='text 1: --labels needs "correct" and "value"'):
        run([str(written(tmp_path, [LINES[0]])), "--labels"])
    with pytest.raises(UserError, match="text 2: it says correct=True, value='391' and answer=390"):
        run([str(written(tmp_path, [right, wrong | {"correct": True}])), "--labels"])
