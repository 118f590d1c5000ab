"""Prompts as the user's turn of a chat: which models get one, what they then read, and what of their texts counts."""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from kernel_surgery import collect_moments, fit_subspace
from kernel_surgery.common.errors import UserError
from kernel_surgery.evaluation.judging import Generation, judged, score, spoken, text_of
from kernel_surgery.evaluation.notes import chat_notes
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.samples import check_run
from kernel_surgery.models.chat import OFF, Chat, choose_chat, has_template, made_for_chat, stops
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.moments import load_moments
from kernel_surgery.subspace.partial import check_partial
from kernel_surgery.subspace.sequential import fit_sequentially
from tests.support.calls import call, one_thread

END = "<|endoftext|>"
TURNS = (
    "{% for m in messages %}BEGIN{{ m['role'] }}: {{ m['content'] }}ENDING{% endfor %}"
    "{% if add_generation_prompt %}BEGINassistant: {% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
TEMPLATE = TURNS.replace("BEGIN", END).replace("ENDING", END)


def folder_with(tmp_path, template: str | None = TEMPLATE, name: str = "model", **changes):
    """The embedded model's folder without weights, with a chat template and other fields of its configurations."""
    made = tmp_path / name
    shutil.copytree(POLYGLOT, made)
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    for file in ("config.json", "generation_config.json"):
        held = json.loads((made / file).read_text()) | changes
        (made / file).write_text(json.dumps(held))
    return made


def test_a_prompt_is_the_users_turn_and_the_assistants_begins(tmp_path):
    folder = folder_with(tmp_path)
    tokenizer, chat = load_tokenizer(str(folder)), choose_chat(str(folder))
    assert chat.on and not chat.thinking and len(chat.template) == 64
    assert chat.text(tokenizer, "1 + 1") == f"{END}user: 1 + 1{END}{END}assistant: <think></think>"
    assert choose_chat(str(folder), thinking=True).text(tokenizer, "1 + 1").endswith("assistant: ")
    assert OFF.text(tokenizer, "1 + 1") == "1 + 1" and OFF.ids(tokenizer, "1 + 1") == tokenizer("1 + 1").input_ids
    assert chat.record() == {"chat": "on", "thinking": False, "chat_template": chat.template}
    assert OFF.record() == {"chat": "off"}


def test_no_special_token_is_added_beside_the_templates_own(tmp_path):
    folder = folder_with(tmp_path)
    tokenizer, chat = load_tokenizer(str(folder)), choose_chat(str(folder))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    assert tokenizer("1 + 1").input_ids[:2] == [0, tokenizer.convert_tokens_to_ids("1")], "it adds one by itself"
    ids = chat.ids(tokenizer, "1 + 1")
    assert ids[0] == 0 and ids[1] != 0 and ids.count(0) == 3


def test_auto_is_on_where_the_model_stops_at_the_end_of_a_turn(tmp_path):
    """The rule on the endings that models have. ids: what the model stops at."""
    tokenizer = load_tokenizer("polyglot")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot_id|>"]})
    im_end, eot = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>"))
    for ending, ids, name, on in (
        ("<|im_end|>\n", {0}, "Qwen/Qwen2.5-3B", False),
        ("<|im_end|>\n", {0}, "Qwen/Qwen3-4B-Base", False),
        ("<|im_end|>\n", {0, im_end}, "Qwen/Qwen2.5-3B-Instruct", True),
        ("<|im_end|>\n", {0, im_end}, "Qwen/Qwen3-4B", True),  # no word in its name says so
        ("<|im_end|>\n", {im_end}, "smollm2", True),
        ("<|eot_id|>", {0, eot}, "meta-llama/Meta-Llama-3-8B-Instruct", True),
        ("<|eot_id|>", {0}, "meta-llama/Meta-Llama-3-8B", False),
        (END, set(), "mine", True),  # the tokenizer's own end token
        ("\n", {0}, "somebody/Instruct-7B", True),
        ("\n", {0}, "google/gemma-2-2b-it", True),
        ("\n", {0}, "somebody/bitter-7B", False),
    ):
        tokenizer.chat_template = TURNS.replace("BEGIN", "").replace("ENDING", ending)
        assert made_for_chat(tokenizer, ids, name) is on, (name, ids)


def test_both_configuration_files_say_where_a_model_stops(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert stops(folder) == {0, 7, 9}
    (folder / "generation_config.json").unlink()
    assert stops(folder) == {0}


def test_a_template_is_found_without_loading_the_tokenizer(tmp_path):
    assert has_template(folder_with(tmp_path)) and not has_template(POLYGLOT)
    inline = folder_with(tmp_path, None, "inline")
    held = json.loads((inline / "tokenizer_config.json").read_text())
    (inline / "tokenizer_config.json").write_text(json.dumps(held | {"chat_template": TEMPLATE}))
    assert has_template(inline) and choose_chat(str(inline)).on


def test_what_cannot_be_is_said(tmp_path):
    plain = folder_with(tmp_path, TEMPLATE.replace("enable_thinking", "other"))
    broken = folder_with(tmp_path, "{{ raise_exception('no user') }}", "broken")
    for name, asked, thinking, said in (
        ("polyglot", "on", False, r"--chat on needs a chat template, and the tokenizer of 'polyglot' has none"),
        ("polyglot", "auto", True, r"--thinking needs a chat template"),
        ("polyglot", "off", True, r"--thinking is for prompts that are put as a chat, but --chat is off"),
        ("polyglot", "yes", False, r"--chat is 'yes': choose from auto, on, off"),
        (str(plain), "auto", True, r"the chat template of 'model' has no switch enable_thinking"),
        (str(broken), "auto", False, r"the chat template cannot be applied \(no user\)\. Use --chat off"),
    ):
        with pytest.raises(UserError, match=said):
            choose_chat(name, asked, thinking=thinking)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>so 12</think>\nThe answer is 7.", "\nThe answer is 7."),
        ("so 12</think>7", "7"),  # the template wrote the first tag
        ("\n<think>so 12, so", ""),  # the budget ended while it thought
        ("It is 7.", "It is 7."),
    ],
)
def test_thinking_is_no_answer(text, said):
    assert spoken(text) == said
    found = judged(text, "What is 3 + 4?", "en", Fraction(7))
    assert found["correct"] == ("7" in said) and found["extracted"] == ("7" if said else None)


def test_the_answer_is_complete_after_the_thinking_not_in_it():
    text, problem = "<think>so 390</think>It is 390.", problems("test", 1)[0]
    problem = type(problem)(**{**vars(problem), "answer": 390, "prompts": {"en": "Add some numbers."}})
    one = Generation(tuple(range(len(text))), text, "stop")
    sample = score(problem, "en", "original", one, lambda ids: text[: len(ids)])
    assert sample["correct"] and sample["fat_characters"] == sample["fat_tokens"] == text.rindex("390") + 3
    assert sample["correct_at"] == {"16": False}, "cut off at 16 tokens it was still thinking"


def test_a_text_begins_with_the_tag_that_the_template_opened(tmp_path):
    folder = folder_with(tmp_path, TEMPLATE.replace("<think></think>", "<think>\n"))
    tokenizer, chat = load_tokenizer(str(folder)), choose_chat(str(folder))
    ids = tokenizer("so 12").input_ids
    assert text_of(tokenizer, chat)(ids) == "<think>so 12" and text_of(tokenizer)(ids) == "so 12"
    assert spoken(text_of(tokenizer, chat)(ids)) == ""


def test_another_chat_than_that_of_the_fit_is_said():
    on, thinking, asked = Chat(True), Chat(True, True), "prompts are put as the user's turn of the chat template"
    differ = "the subspace was fitted on prompts with chat {}, but is evaluated with chat {}"
    for fit, chat, notes in (
        ({"split": "fit"}, OFF, []),  # collected before there was a choice
        ({"split": "fit"}, on, [asked, differ.format("off", "on")]),
        ({"split": "fit", "chat": "off"}, OFF, []),
        ({"split": "fit", "chat": "on", "thinking": False}, on, [asked]),
        ({"split": "fit", "chat": "on", "thinking": False}, OFF, [differ.format("on", "off")]),
        (
            {"split": "fit", "chat": "on", "thinking": False},
            thinking,
            [f"{asked}, thinking", differ.format("on", "on, thinking")],
        ),
        ({"method": "deviations"}, on, [asked]),  # from an .npz, which does not say
        (None, OFF, []),
    ):
        assert chat_notes(SimpleNamespace(fit=fit), Options(), chat) == notes, fit
    said = chat_notes(None, Options(protocol="expag", chat="on"), OFF)
    assert said == ["expag puts prompts as they are, as the reference script did: --chat and --thinking do not count"]


def test_the_commands_record_it_and_a_run_continues_only_with_the_same(tmp_path):
    folder, acts, space = folder_with(tmp_path), tmp_path / "acts.safetensors", tmp_path / "space.safetensors"
    model, small = ("--model", folder), ("--problems", 1, "--device", "cpu")
    run = ("eval", *model, "--subspace", space, *small, "--mode", "hook", "--max-new-tokens", 4, "--no-damage")
    run = (*run, "--out", tmp_path / "run")
    with one_thread():
        collected = call("collect", *model, *small, "--layers", "2-5", "--out", acts)
        assert collected[::2] == (0, ""), collected
        held = load_moments(acts).provenance
        fitted = call("fit", "--activations", acts, "--out", space, "--method", "oblique", "--layers", "2-5")
        assert fitted[::2] == (0, ""), fitted
        on = choose_chat(str(folder)).record()
        assert on.items() <= held.items() and on.items() <= Subspace.load(space).fit.items()
        status, out, error = call(*run)
        assert (status, error) == (0, "") and "prompts are put as the user's turn of the chat template" in out
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert on.items() <= results["config"].items()
        sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert END not in sample["prompt"], "scoring reads the problem, not the template around it"
        status, _, error = call(*run, "--resume", "--chat", "off")
        assert status == 2 and "holds a run with other settings: chat was 'on', now 'off'" in error
        other = (*run[:-1], tmp_path / "other")
        assert "was fitted on prompts with chat on, but is evaluated with chat off" in call(*other, "--chat", "off")[1]


def test_moments_read_every_prompt_in_the_chat_and_as_it_is(tmp_path):
    """The template's tokens are counted too."""
    folder = folder_with(tmp_path)
    tokens = {}
    for chat in ("on", "off"):
        out = tmp_path / f"{chat}.safetensors"
        words = ("--problems", 1, "--device", "cpu", "--pool", "tokens", "--keep-first", "--layers", 2, "--chat", chat)
        assert call("collect", "--model", folder, *words, "--languages", "en,zh", "--out", out)[0] == 0
        tokens[chat] = load_moments(out).provenance["tokens"]
        assert load_moments(out).provenance.get("forms") == {"on": "chat and plain", "off": None}[chat]
    tokenizer, how = load_tokenizer(str(folder)), choose_chat(str(folder))
    for language in ("en", "zh"):
        asked = [p.prompts[language] for p in problems("fit", 1)]
        assert tokens["off"][language] == sum(len(tokenizer(prompt).input_ids) for prompt in asked)
        in_chat = sum(len(how.ids(tokenizer, prompt)) for prompt in asked)
        assert tokens["on"][language] == in_chat + tokens["off"][language]


def test_a_fit_layer_by_layer_reads_both_forms_too(tmp_path):
    """Its first layer, which no edit comes before, is that of a fit to the moments of both."""
    folder = folder_with(tmp_path)
    model, tokenizer = load_model(str(folder), torch.float32), load_tokenizer(str(folder))
    how = choose_chat(str(folder))
    asked = problems("fit", 1)
    moments = collect_moments(model, tokenizer, asked, ("en", "zh"), "2-3", chat=how)
    reader = Layerwise(folder, torch.float32)
    found = fit_sequentially(reader, tokenizer, asked, ("en", "zh"), [2, 3], chat=how)
    assert found.fit["tokens"] == moments.provenance["tokens"] and found.fit["forms"] == "chat and plain"
    both = fit_subspace(moments, layers=[2]).projections[2].basis
    # Read without padding, the activations differ by roundings of float32. A fit to one form is another edit.
    near = float((found.projections[2].basis - both).norm())
    for one in (OFF, replace(how, alone=True)):
        alone = fit_sequentially(reader, tokenizer, asked, ("en", "zh"), [2, 3], chat=one).projections[2].basis
        far = float((alone - both).norm())
        print(f"both forms {near:.1e}, one form {far:.1e}")
        assert near < far / 100
    assert max(found.fit["sequential"].values()) < 1e-4


def test_what_was_begun_before_there_was_a_choice_is_continued_without_a_chat(tmp_path):
    """Its records say nothing of a chat: it was off."""
    (tmp_path / "config.json").write_text('{"seed": 0}')
    check_run(tmp_path, {"seed": 0} | OFF.record(), resume=True)
    with pytest.raises(UserError, match="chat was 'off', now 'on'"):
        check_run(tmp_path, {"seed": 0} | Chat(True).record(), resume=True)
    (tmp_path / "acts.partial").mkdir()
    (tmp_path / "acts.partial" / "settings.json").write_text('{"seed": 0}')
    check_partial(tmp_path / "acts.partial", {"seed": 0} | OFF.record())
    with pytest.raises(UserError, match="chat is 'off' there, 'on' here"):
        check_partial(tmp_path / "acts.partial", {"seed": 0} | Chat(True).record())
