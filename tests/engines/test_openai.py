"""`--engine openai` against a server that fails as told: what is asked, retried, refused, recorded and resumed."""

import asyncio
import json
import os
import random
import signal
import time
from types import SimpleNamespace

import pytest

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.engines.server import KEY, RETRIES, Server, as_text, read_served, shown
from kernel_surgery.engines.texts import EngineText
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.run import evaluate
from kernel_surgery.evaluation.served import EngineAsking, Running
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.load import load_tokenizer
from kernel_surgery.problems.generator import problems
from tests.support.calls import call
from tests.support.server import DROP, HANG, answer, serving

MODELS = ("base", "edited")
SAID = {"base": "The answer is 42.", "edited": "答案是42。"}
LIMIT = 20  # seconds: far more than a cancelled request takes, and less than one that hangs (HANG_S)
SECRET = "sk-thekeythatnobodymaysee"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture
def end(tokenizer):
    return tokenizer.eos_token_id


@pytest.fixture
def server(tokenizer):
    """A function that makes a `Server` for the model "base" of a fake one."""
    return lambda fake, in_flight=4, **more: Server("base", fake.url, tokenizer, in_flight, **more)


def echo(body, nth):
    """The prompt's last token, as often as its first says."""
    return answer([body["prompt"][-1]] * body["prompt"][0])


def asked(count):
    return [[1 + i % 3, 10 + i] for i in range(count)]


def echoed(prompts):
    return [EngineText((last,) * first, "stop") for first, last in prompts]


def ask(server, prompts, **more):
    return server.texts(prompts, **{"max_new_tokens": 8, "ends": (0,)} | more)


def test_requests_in_flight_are_bounded_and_answers_keep_their_order(server):
    def reply(body, nth):
        time.sleep(random.uniform(0, 0.05))  # they are finished in another order
        return echo(body, nth)

    done = []
    with serving(reply, pause=0.02) as fake:
        assert ask(server(fake), asked(24), advance=done.append) == echoed(asked(24))
        assert fake.most == 4 and done == [1] * 24
        assert sorted(body["prompt"] for body in fake.asked) == sorted(asked(24))
        assert ask(server(fake, 1), asked(3)) == echoed(asked(3))


def test_a_request_asks_for_the_models_own_greedy_text(server):
    with serving(echo) as fake:
        ask(server(fake), [[1, 7]], max_new_tokens=5, ends=(0, 3))
        (body,) = fake.asked
    wanted = {"model": "base", "prompt": [1, 7], "max_tokens": 5, "temperature": 0.0, "stop_token_ids": [0, 3]}
    # Without these a server takes penalties from the checkpoint's generation_config.json.
    plain = {"repetition_penalty": 1.0, "repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    assert body == wanted | plain | {"return_token_ids": True}


@pytest.mark.parametrize("fault", [429, 500, DROP])
def test_what_may_pass_is_tried_again(fault, server):
    with serving(lambda body, nth: fault if nth == 0 and body["prompt"][-1] % 2 else echo(body, nth)) as fake:
        assert ask(server(fake), asked(6)) == echoed(asked(6))
        assert [fake.tries(prompt) for prompt in asked(6)] == [1, 2] * 3


def test_a_request_that_hangs_is_given_up_and_tried_again(server):
    with serving(lambda body, nth: HANG if nth == 0 else echo(body, nth)) as fake:
        assert ask(server(fake, timeout_s=0.5), asked(2)) == echoed(asked(2))
        assert fake.tries(asked(2)[0]) == 2
    with serving(lambda body, nth: HANG) as fake, pytest.raises(UserError, match=r"no answer within 0\.2 s"):
        server(fake, timeout_s=0.2).check([1], (0,))


def test_a_request_is_tried_so_often_and_no_more(server):
    with serving(lambda body, nth: 503 if body["prompt"] == [1, 10] else echo(body, nth)) as fake:
        with pytest.raises(KernelSurgeryError, match=r"'base' at .* did not write a text \(Error code: 503") as error:
            ask(server(fake, 1), asked(4))
        assert fake.tries([1, 10]) == 1 + RETRIES
        assert "\n" not in str(error.value) and "go on with --resume" in str(error.value)
        # One at a time: the others wait for it, and are not asked after it.
        assert all(body["prompt"] == [1, 10] for body in fake.asked)


def test_an_error_that_does_not_pass_cancels_the_others(server):
    with serving(lambda body, nth: 400 if body["prompt"] == [1, 13] else HANG) as fake:
        began = time.monotonic()
        with pytest.raises(KernelSurgeryError, match="Error code: 400"):
            ask(server(fake), asked(20))
        assert time.monotonic() - began < LIMIT
        assert fake.tries([1, 13]) == 1 and len(fake.asked) <= 4


def test_ctrl_c_ends_at_once(server):
    def reply(body, nth):
        os.kill(os.getpid(), signal.SIGINT)
        return HANG

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(reply) as fake:
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                ask(server(fake, 1), asked(3))
            assert time.monotonic() - began < LIMIT and len(fake.asked) == 1
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_notebook_has_an_event_loop_of_its_own(server):
    async def cell():
        return ask(server(fake), asked(3))

    with serving(echo) as fake:
        assert asyncio.run(cell()) == echoed(asked(3))


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (answer([5, 6, 0], finish="stop"), EngineText((5, 6), "stop")),
        (answer([5, 6], finish="length"), EngineText((5, 6), "length")),
        # A server that does not cut at our end tokens: its text goes on to the budget.
        (answer([5, 0, 6], finish="length"), EngineText((5,), "stop")),
        # A server that stops at a token of its own.
        (answer([5, 6], finish="stop"), EngineText((5, 6), "stop")),
        (answer([5, 6], finish="eos_token"), EngineText((5, 6), "stop")),
        (answer([], finish="stop"), EngineText((), "stop")),
        (answer(finish="content_filter"), None),
        (answer(finish="abort"), None),
        (answer(finish=None), None),
        ({"id": "1"}, None),
        ({"choices": []}, None),
        ("<html>a proxy's page</html>", None),
    ],
)
def test_a_text_ends_at_its_end_token_at_the_budget_or_is_refused(said, text, server):
    with serving(lambda body, nth: said) as fake:
        if text is not None:
            assert ask(server(fake), [[1, 2]]) == [text]
            return
        with pytest.raises(KernelSurgeryError, match=r"ended a text because|an answer without a text"):
            ask(server(fake), [[1, 2]])


def test_a_text_without_token_ids_is_tokenized_again(server, tokenizer):
    text = "所以答案是 42."
    with serving(lambda body, nth: answer(None, text, "length")) as fake:
        (found,) = ask(server(fake), [[1, 2]])
    assert found == EngineText(tuple(tokenizer(text).input_ids), "length", text) and len(found.ids) > 3


class Written:
    """A writer of one text."""

    def __init__(self, text):
        self.text = text

    def texts(self, prompts, **asked):
        return [self.text for _ in prompts]


@pytest.mark.parametrize("returned", [True, False])
def test_a_text_begins_with_the_thinking_that_its_template_opened(returned, tokenizer):
    """Else a text that is cut off while it thinks would count as what the model says."""
    tokenizer = load_tokenizer("polyglot")
    tokenizer.chat_template = "{{ messages[0]['content'] }}<think>\n"
    ids = tuple(tokenizer("42 or 43").input_ids)
    writer = Written(EngineText(ids, "length", None if returned else "42 or 43"))
    asking = EngineAsking(tokenizer, (), ("en",), 8, Chat(True, True), (0,), Running(writer))
    (found,) = asking.write(["1 + 1"], lambda done: None)
    assert (found.text, found.from_text) == ("<think>42 or 43", not returned)


def test_a_prompt_as_text_is_what_the_server_makes_the_tokens_of(server, tokenizer):
    ids = tokenizer("1 + 1 =").input_ids
    with serving(lambda body, nth: answer([5], read=len(ids))) as fake:
        ask(server(fake, text_prompts=True), [ids])
        assert [body["prompt"] for body in fake.asked] == ["1 + 1 ="]
    # A server that adds a token reads another prompt.
    for read, more in ((len(ids) + 1, {"text_prompts": True}), (len(ids) + 1, {}), (len(ids) - 1, {})):
        refused = pytest.raises(KernelSurgeryError, match=f"read {read} tokens of a prompt that has {len(ids)}")
        with serving(lambda body, nth, read=read: answer([5], read=read)) as fake, refused:
            ask(server(fake, **more), [ids])


class Letters:
    """A tokenizer of letters, which begins every text with 1. The ids 1 to 3 are special, and "#" reads as 3."""

    special = ("<s>", "</s>", "#")

    def decode(self, ids, **asked):
        return "".join(self.special[i - 1] if i < 4 else chr(i) for i in ids)

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1] + [3 if letter == "#" else ord(letter) for letter in text])


def test_the_text_of_a_prompt_leaves_out_the_token_that_a_tokenizer_adds():
    tokenizer = Letters()
    assert as_text(tokenizer, tokenizer("ab#").input_ids) == "ab#"
    with pytest.raises(KernelSurgeryError, match="cannot be sent as text"):
        as_text(tokenizer, [97, 98])  # without the first token, which it always adds


BASE = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("given", "name", "address"),
    [
        ("original=Qwen/Qwen2.5-3B@http://h:1/v1", "Qwen/Qwen2.5-3B", "http://h:1/v1"),
        ("original=me/model@rev:2", "me/model@rev:2", BASE),
        ("original=me@httpbin", "me@httpbin", BASE),
        ("original=a=b@https://user:pw@h/v1", "a=b", "https://user:pw@h/v1"),
    ],
)
def test_a_models_name_may_hold_the_letters_of_an_address(given, name, address):
    assert read_served([given], BASE) == {"original": (name, address)}


@pytest.mark.parametrize(
    ("given", "base", "message"),
    [
        (["base"], BASE, "--served takes MODE=NAME"),
        (["hook=base"], BASE, "--served takes MODE=NAME"),
        (["lora="], BASE, "--served takes MODE=NAME"),
        (["lora=a", "lora=b"], BASE, "names mode lora twice"),
        (["original=a", "lora=a"], BASE, "original and lora are the same model"),
        (["lora=a"], None, "has no address"),
        (["lora=a"], "localhost:8000/v1", "must be like"),
        (["lora=a@http://h:port/v1"], None, "must be like"),
        (["lora=a@http://"], None, "must be like"),
    ],
)
def test_other_forms_of_served_are_refused(given, base, message):
    with pytest.raises(UserError, match=message):
        read_served(given, base)


def test_a_printed_address_has_no_password():
    assert shown("https://user:p@ss@h:1/v1?key=k") == shown("https://h:1/v1") == "https://h:1/v1"


# The whole command.


def options(fake, folder, **more):
    served = {"served": ("original=base", "fused=edited"), "base_url": fake.url}
    return Options(**{"engine": "openai", "problems": 1, "out": folder, "in_flight": 3} | served | more)


def words(fake, folder):
    """The same as words of the command line."""
    served = ("--served", "original=base", f"fused=edited@{fake.url}", "--base-url", fake.url)
    return ("--engine", "openai", "--problems", 1, "--out", folder, *served)


@pytest.fixture
def write(tokenizer, end):
    return lambda body, nth=0: answer([*tokenizer(SAID[body["model"]]).input_ids, end])


def everything(folder):
    return "".join(file.read_text(encoding="utf-8") for file in sorted(folder.iterdir()))


def in_json(value):
    return json.loads(json.dumps(value))


def test_an_evaluation_has_the_servers_texts_and_says_what_is_not_known(write, tmp_path):
    with serving(write, MODELS) as fake:
        status, _, err = call("eval", *words(fake, tmp_path / "run"))
        assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    texts = [json.loads(line)["text"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert texts == [SAID["base"]] * 10 + [SAID["edited"]] * 10
    assert results["modes"]["original"]["en"]["language_fidelity"] == 1
    assert results["modes"]["fused"]["en"]["language_fidelity"] == 0
    assert [pair["language"] for pair in results["paired"]] == ["en", "zh", "all"]
    assert results["damage_in_words"].startswith("damage: not measured (a server gives no logits")
    note = "a server wrote the texts (original is 'base', fused is 'edited'): its weights and edits, and the strength"
    assert any(found.startswith(note) for found in results["notes"])
    assert not any("token ids" in found or "as text" in found for found in results["notes"])
    assert note.split(" (")[0] in (tmp_path / "run" / "report.html").read_text()
    # Records travel: they name the models and no address.
    assert results["config"]["served"] == {"original": "base", "fused": "edited"}
    assert "127.0.0.1" not in everything(tmp_path / "run")
    assert "--served original=base fused=edited@URL --base-url URL" in results["command"]


def test_notes_name_the_modes_whose_token_ids_were_made_again(write, tmp_path):
    def reply(body, nth):
        return answer(None, SAID["edited"]) if body["model"] == "edited" else write(body)

    with serving(reply, MODELS) as fake:
        evaluate(options(fake, tmp_path / "run"))
        # The note stays when the run is scored again from its files, without a request.
        before = len(fake.asked)
        again = evaluate(options(fake, tmp_path / "run", resume=True))
        assert len(fake.asked) == before
    (note,) = (found for found in again.results["notes"] if "token ids" in found)
    assert note.startswith("fused: the server returned no token ids")
    assert all("tokens_from_text" not in sample for sample in again.cells["original", "en"])


def test_a_server_that_perhaps_edits_nothing_is_noted(write, tokenizer, tmp_path):
    only = tokenizer(problems("test", 1)[3].prompts["en"]).input_ids

    def one_differs(body, nth):
        return write(body if body["prompt"] == only else body | {"model": "base"})

    def notes(reply, folder):
        with serving(reply, MODELS) as fake:
            found = evaluate(options(fake, folder, languages="en")).results["notes"]
        return [note for note in found if "every text is the original's" in note]

    (note,) = notes(lambda body, nth: write(body | {"model": "base"}), tmp_path / "none")
    assert note.startswith("fused: ")
    assert notes(one_differs, tmp_path / "one") == []


def test_text_prompts_are_noted_and_belong_to_the_run(write, tmp_path):
    with serving(write, MODELS) as fake:
        run = evaluate(options(fake, tmp_path / "run", text_prompts=True, languages="en"))
        assert problems("test", 1)[0].prompts["en"] in {body["prompt"] for body in fake.asked}
        assert any(note.startswith("prompts were sent as text") for note in run.results["notes"])
        with pytest.raises(UserError, match="text_prompts was True, now False"):
            evaluate(options(fake, tmp_path / "run", languages="en", resume=True))


def test_a_run_that_failed_goes_on_elsewhere_and_asks_nothing_again(write, tokenizer, tmp_path):
    bad = tokenizer(problems("test", 1)[2].prompts["zh"]).input_ids
    fails = {"base": True}

    def reply(body, nth):
        return 400 if body["prompt"] == bad and fails.get(body["model"]) else write(body)

    folder = tmp_path / "run"
    with serving(reply, MODELS) as fake:
        status, _, err = call("eval", *words(fake, folder))
        assert status == 2 and err.count("error:") == 1
        assert "'base' at" in err and "Error code: 400" in err and "were kept" in err
    kept = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {(sample["mode"], sample["language"]) for sample in kept} == {("original", "en")}
    assert not (folder / "results.json").exists()
    english = [tokenizer(problem.prompts["en"]).input_ids for problem in problems("test", 1)]
    with serving(write, MODELS) as fake:  # on another port
        status, _, err = call("eval", *words(fake, folder), "--resume", "--in-flight", 2, "--request-timeout", 30)
        assert status == 0, err
        again = [body["prompt"] for body in fake.asked if body["model"] == "base" and body["max_tokens"] > 1]
        assert len(again) == 5 and not [prompt for prompt in again if prompt in english]
        # An uninterrupted run has the same texts and verdicts.
        whole = evaluate(options(fake, tmp_path / "whole"))
    assert (folder / "samples.jsonl").read_bytes() == (whole.folder / "samples.jsonl").read_bytes()
    assert json.loads((folder / "results.json").read_text())["paired"] == in_json(whole.results["paired"])


def test_only_the_servers_that_are_still_needed_must_be_there(write, tmp_path):
    def reply(body, nth):
        return 400 if body["model"] == "edited" and body["max_tokens"] > 1 else write(body)

    with serving(reply, MODELS) as fake, pytest.raises(KernelSurgeryError):
        evaluate(options(fake, tmp_path / "run"))
    with serving(write, ("edited",)) as fake:
        assert evaluate(options(fake, tmp_path / "run", resume=True)).results["paired"]
        with pytest.raises(UserError, match="serves no model 'base', only edited"):
            evaluate(options(fake, tmp_path / "other"))


def test_an_adapter_may_be_named_after_its_base(tokenizer):
    with serving(lambda body, nth: answer([5]), ("a:b",)) as fake:
        Server("a:b:lora", fake.url, tokenizer, 1).check([1], (0,))
        assert [body["model"] for body in fake.asked] == ["a:b:lora"]
        with pytest.raises(UserError, match="serves no model 'c:lora', only a:b"):
            Server("c:lora", fake.url, tokenizer, 1).check([1], (0,))


def html(body, nth):
    return "<html></html>"


def refusing(body, nth):
    return 422 if isinstance(body["prompt"], list) else answer()


@pytest.mark.parametrize(
    ("given", "url", "message"),
    [
        ({"models": ("other",)}, "{url}", "serves no model 'base', only other."),
        ({}, "http://127.0.0.1:1/v1", "no list of models from http://127.0.0.1:1/v1/models: Connection error"),
        ({}, "http://127.0.0.1:1/v1", "Is the server running, and is this its address?"),
        ({}, "http://127.0.0.1:{port}", "Error code: 404. Does the address end in /v1?"),
        ({"listing": ("<html></html>", 200)}, "{url}", "Does the address end in /v1?"),
        ({"listing": ({"error": {"message": "no"}}, 401)}, "{url}", f"The environment variable {KEY} holds the key"),
        ({"models": ("other", "base:lora")}, "{url}", "serves no model 'base', only other, base:lora."),
        ({"reply": refusing}, "{url}", "If it takes no token ids as prompts, add --text-prompts."),
        ({"reply": html}, "{url}", "gave an answer without a text"),
        ({}, "127.0.0.1:{port}/v1", "must be like http://localhost:8000/v1"),
    ],
)
def test_a_server_that_cannot_be_used_is_found_before_anything_is_written(given, url, message, write, tmp_path):
    with serving(**{"reply": write, "models": MODELS} | given) as fake:
        url = url.format(url=fake.url, port=fake.port)
        served = ("--engine", "openai", "--served", "original=base", "--base-url", url, "--mode", "original")
        status, _, err = call("eval", *served, "--problems", 1, "--out", tmp_path / "run")
    assert status == 2 and err.startswith("error: ") and message in err and "Nothing was written." in err
    assert not (tmp_path / "run").exists() and "Traceback" not in err


def test_a_key_is_sent_and_never_shown(write, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with serving(write, MODELS) as fake:
        status, out, err = call("eval", *words(fake, tmp_path / "run"))
        assert status == 0 and fake.keys == {f"Bearer {SECRET}"}
        assert SECRET not in everything(tmp_path / "run") + out + err
    # A server that repeats it in its error: the message, and what a traceback shows.
    with serving(lambda body, nth: 401, MODELS) as fake:
        fake.said = f"Incorrect API key provided: {SECRET}"
        with pytest.raises(UserError) as error:
            evaluate(options(fake, tmp_path / "other"))
    assert "Incorrect API key provided: ***" in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert not (tmp_path / "other").exists()


def test_a_password_in_an_address_is_never_shown(write, tmp_path):
    with serving(write, MODELS) as fake:
        address = fake.url.replace("//", f"//user:{SECRET}@")
        fake_with = SimpleNamespace(url=address)
        status, out, err = call("eval", *words(fake_with, tmp_path / "run"))
        assert status == 0, err
        shown_all = everything(tmp_path / "run") + out + err
        fake.models = ("other",)
        status, out, err = call("eval", *words(fake_with, tmp_path / "other"))
        assert status == 2 and "serves no model" in err
    assert SECRET not in shown_all + out + err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"in_flight": 0}, "--in-flight must be at least 1"),
        ({"request_timeout": 0.0}, "--request-timeout must be positive"),
        ({"request_timeout": float("nan")}, "--request-timeout must be positive"),
        ({"served": ("original=base",)}, "needs --served fused=NAME"),
        ({"mode": "hook"}, "--mode hook does not exist in --engine openai"),
        ({"controls": "haar:2"}, "a server does not load them"),
        ({"tensor_parallel": 2}, "--tensor-parallel is for --engine vllm"),
        ({"engine": "transformers"}, "is for --engine openai, not --engine transformers"),
        ({"engine": "transformers", "served": (), "base_url": None, "text_prompts": True}, "--text-prompts is for"),
    ],
)
def test_options_that_a_server_does_not_have_are_refused(more, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate(options(SimpleNamespace(url=BASE), tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_the_chat_off_is_no_opener(tokenizer):
    asking = EngineAsking(tokenizer, (), ("en",), 8, OFF, (0,), Running(Written(EngineText((5,), "stop", "42"))))
    assert asking.write(["1 + 1"], lambda done: None)[0].text == "42"
