"""Progress is for a terminal: bars for what can be counted, a clock for what cannot, and nothing in a pipe."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from kernel_surgery.common import progress as module
from kernel_surgery.common.progress import waiting

ROOT = Path(__file__).resolve().parents[2]


def on_a_terminal(code: str, size: tuple[int, int] = (24, 80)) -> str:
    """What a program writes to stderr, which is a terminal of that many rows and columns."""
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, size)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=other_end, text=True)
    os.set_blocking(terminal, False)
    try:
        shown = os.read(terminal, 65536).decode()
    except BlockingIOError:
        shown = ""
    os.close(terminal)
    os.close(other_end)
    assert done.returncode == 0 and done.stdout == "", shown
    return shown


PREPARED = "import time; from kernel_surgery.common import progress as p; p.QUIET_S = 0.02\n"


def test_a_clock_runs_while_nothing_can_be_counted_and_is_erased():
    said = on_a_terminal(PREPARED + "with p.waiting('loading it'): time.sleep(0.3)")
    assert said.count("\rloading it (0 s)") >= 2 and said.endswith("\r\x1b[K")


def test_a_short_wait_shows_nothing():
    assert on_a_terminal("from kernel_surgery.common import progress as p\nwith p.waiting('loading it'): pass") == ""


def test_a_bar_takes_the_place_of_the_clock():
    inside = "with p.progress_bar(3, 'items', leave=False) as bar, p.waiting('loading it'): time.sleep(0.3)"
    said = on_a_terminal(PREPARED + inside)
    assert "items:" in said and "loading it" not in said


@pytest.mark.parametrize("size", [(24, 80), (0, 0)])
def test_a_bar_is_seen_also_where_a_terminal_does_not_say_how_large_it_is(size):
    said = on_a_terminal(PREPARED + "with p.progress_bar(3, 'items') as bar: bar.update()", size)
    assert "items:" in said and "0/3" in said


def test_a_pipe_gets_neither(capfd, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.0)
    with waiting("loading it"):
        pass
    assert capfd.readouterr() == ("", "")


def test_an_error_ends_the_clock_and_goes_on():
    code = "try:\n  with p.waiting('loading it'):\n    time.sleep(0.2); raise KeyError\nexcept KeyError: pass"
    assert on_a_terminal(PREPARED + code).endswith("\r\x1b[K")


def test_a_batch_of_texts_moves_its_bar_at_every_token(monkeypatch):
    """On a terminal: 2 texts of 4 tokens are 2 texts, in steps of half a text. The texts are the same ones."""
    from kernel_surgery.evaluation import generate
    from kernel_surgery.models.load import load_model, load_tokenizer

    model, tokenizer, steps = load_model("polyglot"), load_tokenizer("polyglot"), []
    prompts = ["Work out 12 + 7.", "Work out 1 + 1."]
    plain = generate.generate(model, tokenizer, prompts, max_new_tokens=4, advance=steps.append)
    assert steps == [2]
    steps.clear()
    monkeypatch.setattr(generate, "shown", lambda: True)
    assert generate.generate(model, tokenizer, prompts, max_new_tokens=4, advance=steps.append) == plain
    assert steps == [0.5, 0.5, 0.5, 0.5, 0]


def test_the_damage_counts_the_tokens_that_it_reads():
    from kernel_surgery.damage.neutral import NeutralText, encoded, tokens_in
    from kernel_surgery.models.load import load_model, load_tokenizer

    model, tokenizer, read = load_model("polyglot"), load_tokenizer("polyglot"), []
    text = NeutralText(model, tokenizer, ("en", "sw"), "dev", read.append)
    total = tokens_in(encoded(tokenizer, ("en", "sw"), "dev"))
    assert sum(read) == total > 500
    text.read()
    assert sum(read) == 2 * total
