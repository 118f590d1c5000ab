"""The report: one well-formed page with everything in it, that fetches nothing and says what the numbers say."""

import base64
import hashlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from kernel_surgery.common.page import PANEL, table
from kernel_surgery.evaluation.controls import MEASURES, compare
from kernel_surgery.evaluation.pairs import LIMIT, SAME, changed, changed_texts, entries, marked
from kernel_surgery.evaluation.report import cards, differences, first_screen, sentence, write_report
from kernel_surgery.evaluation.report import page as page_of
from kernel_surgery.evaluation.summary import pair, power, summarize
from tests.damage.test_words import damage_of, reading
from tests.evaluation.test_summary import cells
from tests.support.browser import found, too_wide


class Page(HTMLParser):
    """Open tags are closed in order; addresses are collected."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action") and v and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def whole(made, **more):
    """results.json of these cells, with everything that a run can bring along."""
    modes = {}
    for (mode, language), cell in made.items():
        modes.setdefault(mode, {})[language] = summarize(cell, 100)
    languages = list(modes["original"])
    paired = pair(made)
    return {
        "damage_in_words": "damage, fused: like 4-bit. KL en 0.04, zh 0.0437 nats per token",
        **{
            "modes": modes,
            "paired": paired,
            "power": power(paired),
            "edits": {},
            "environment": {"torch": "2"},
        },
        "config": {"languages": languages, "mode": "fused", "protocol": "strict", "max_new_tokens": 100},
        **{"model": {"id": "pico & co"}, "notes": ["fitted on <mlp_out>"], "provider": "aten/cpu"},
        "command": "python -m kernel_surgery.eval --mode fused --out 'a & b'",
        "subspace": {
            **{"rank": 2, "site": "mlp_out", "captured": {"1": 0.9, "2": 0.8}},
            "spectrum": {"1": [3.0, 2.0, 1.0], "2": [4.0, 2.0, 0.5]},
        },
        "damage": {
            **damage_of({"fused": {"en": reading(0.04), "zh": reading(0.0437)}}),
            "chance": 0.5,
            "probes": {
                m: {"mlp_out": {"0": 1.0, "1": v}, "resid_post": {"0": 1.0, "1": 1.0}}
                for m, v in (("original", 0.99), ("fused", 0.5))
            },
        },
        "controls": control_figures(modes, languages),
    } | more


# Two budget curves, three controls, two probes, two of the subspace. Intervals are drawn without them.
PICTURES = 9


def control_figures(modes, languages):
    figures = {m: {lang: {k: modes[m][lang][k] for k in MEASURES} for lang in languages} for m in modes}
    rows = [
        {"name": f"haar:{i:02d}", "language": lang} | figures["original"][lang] for i in range(3) for lang in languages
    ]
    about = {"kind": "haar", "count": 3, "mode": "fused", "problems": 4, "seed": 0, "rows": rows}
    return about | {
        "real": figures["fused"],
        "original": figures["original"],
        "percentiles": compare(figures["fused"], rows),
    }


@pytest.fixture
def made():
    both = cells([True, False, True, True], [True, True, True, False], language="ar")
    both |= cells([True] * 4, [False] * 4, language="en")
    both["fused", "ar"][3]["text"] = "<script>alert(1)</script> الجواب هو 5"
    both["original", "ar"][3]["text"] = "الجواب هو 4"
    return both


def written(tmp_path, made, **more):
    write_report(tmp_path / "report.html", whole(made, **more), made)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def parsed(text):
    page = Page()
    page.feed(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    return page


def test_the_report_is_one_well_formed_page_that_fetches_nothing_and_escapes_texts(tmp_path, made):
    text = written(tmp_path, made)
    page = parsed(text)
    assert page.open == [] and page.addresses == []
    assert "@import" not in text and "url(http" not in text
    assert "no difference shown" in page.text and "fitted on <mlp_out>" in page.text
    assert "<script>alert(1)</script> الجواب" in page.text and "dir=auto" in text
    assert "python -m kernel_surgery.eval --mode fused --out 'a & b'" in page.text


def test_no_script_but_the_pages_own_may_run(tmp_path, made):
    text = written(tmp_path, made)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    # A text's own tag is escaped, so it is none.
    assert len(scripts) == 1 and "alert(1)" not in scripts[0]
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in text


def test_every_section_is_there_with_its_picture_and_the_words_follow(tmp_path, made):
    text = written(tmp_path, made)
    for head in ("Texts", "Damage", "Erasure", "Answers", "Controls", "Subspace", "How it was run"):
        assert f"<h2>{head}</h2>" in text and f'<a href="#{head.lower().replace(" ", "-")}">' in text
    assert text.count("<svg xmlns") == PICTURES
    page = parsed(text)
    # The first screen says the verdict and what it rests on, before the texts.
    first = page.text[: page.text.index("from the original's. What differs is marked")]
    assert re.search(
        r"This edit does [\d.]+ times \([\d.]+ to [\d.]+\) the damage of 4-bit weights in \w\w, where the ratio", first
    )
    assert "no difference in accuracy shown." in first
    assert "KL en 0.04, zh 0.0437 nats per token" in first and "1 of 8" in first
    assert "0.50 (original 0.99)" in first, "the lowest accuracy of the probe over the layers"
    for row in whole(made)["paired"]:
        assert row["verdict"].split(" (")[0] in first and row["verdict"] in page.text
        assert f"{row['delta']:+.3f}" in first
    assert "Smallest difference that can be shown: ar none" in first
    cells = whole(made)["modes"]
    was, *edited = (cells[mode]["ar"]["accuracy"] for mode in cells)
    assert any(f"ar {was:.3f}, edited {now:.3f}" in first for now in edited)
    assert "3 random subspaces (haar) of the same rank" in page.text and "0.0437 (" in page.text
    # No picture is wider than a phone: it would be shrunk until nobody can read it.
    widths = [float(width) for width in re.findall(r'<svg[^>]*? width="([\d.]+)pt"', text)]
    assert len(widths) == PICTURES and max(widths) <= 72 * PANEL
    damage = whole(made)["damage"] | {"leak": {"fused": {"mlp_out": {"10": 1e-7, "9": 0.25}, "resid_post": {"9": 0.5}}}}
    page = parsed(written(tmp_path, made, damage=damage))
    assert "fused, resid_post" in page.text and "0.5" in page.text
    assert page.text.index("0.25") < page.text.index("1e-07")
    # A run without them has none of them.
    bare = written(tmp_path, made, damage=None, controls=None, subspace={}, command=None)
    absent = ("Controls", "<h2>Damage", "Erasure", "<h2>Subspace")
    assert bare.count("<svg xmlns") == 2 and not any(head in bare for head in absent)
    assert "No difference in accuracy shown. The damage was not measured." in parsed(bare).text


LARGEST = "in zh, where the ratio is the largest"


@pytest.mark.parametrize(
    ("word", "words", "tone"),
    [
        ("below rounding", "changes the model less than running it in the other precision", "good"),
        ("like 8-bit", f"does 0.75 times (0.5 to 1) the damage of 8-bit weights {LARGEST}", "good"),
        ("like 4-bit", f"does 0.25 times (0.2 to 0.3) the damage of 4-bit weights {LARGEST}", ""),
        (
            "worse than 4-bit",
            f"does 0.25 times (0.2 to 0.3) the damage of 4-bit weights {LARGEST}",
            "caution",
        ),
        ("broken", "breaks the model", "bad"),
    ],
)
def test_the_verdict_follows_the_damages_word_and_names_the_ratio(made, word, words, tone):
    results = whole(made)
    for verdict in results["damage"]["verdict"].values():
        verdict |= {"word": word, "language": "en"}
        # The language with the largest KL need not be the one that lost the most beside the yardstick.
        verdict["languages"]["en"]["ratios"] = {"8-bit": [0.5, 0.4, 0.6], "4-bit": [0.125, 0.1, 0.2]}
        verdict["languages"]["zh"]["ratios"] = {"8-bit": [0.75, 0.5, 1.0], "4-bit": [0.25, 0.2, 0.3]}
    assert sentence(results) == f"This edit {words}; no difference in accuracy shown."
    card = next(card for card in cards(results) if card.label == "Damage")
    assert (card.big, card.tone) == (word, tone)


def test_text_that_the_original_cannot_predict_is_said_on_the_first_screen(made):
    results = whole(made)
    assert "worse than without context" not in first_screen(results)
    for by in results["damage"]["yardsticks"]["no context"].values():
        by["original_perplexity"] = by["perplexity"] + 1
    assert "The original itself predicts this text worse than without context (en, zh)" in first_screen(results)


def test_the_verdict_says_where_accuracy_moved(made):
    results = whole(made)
    results["paired"][0]["verdict"] = "worse"
    assert sentence(results).endswith(f"accuracy worse in 1 of {len(results['paired'])} comparisons.")
    assert next(card for card in cards(results) if card.label == "Accuracy").tone == "bad"
    results["paired"] = []
    assert sentence(results) == "No edited model was compared." and "not edited" in page_of(results, made)


def test_the_paired_differences_are_drawn_where_they_lie(made):
    """The middle of the axis is zero; an interval's ends lie on the side of their sign."""
    results = whole(made)
    drawn = differences(results)
    rows = re.findall(r'<line x1="([\d.]+)%" x2="([\d.]+)%" y1="50%" y2="50%" stroke="var\(--(\w+)\)" stroke-w', drawn)
    assert len(rows) == len(results["paired"])
    reach = 1.1 * max(abs(v) for r in results["paired"] for v in r["ci95"])
    for (left, right, _), r in zip(rows, results["paired"], strict=True):
        for at, value in ((left, r["ci95"][0]), (right, r["ci95"][1])):
            assert float(at) == pytest.approx(50 + 50 * value / reach, abs=0.01)


TENSORS = [
    {"layer": 2, "tensor": "model.layers.2.mlp.down_proj.weight", "dtype": "BF16", "finite": True, "leak_gate": 1.1}
    | {"error_over_bound": 0.98, "leak": 1e-3, "leak_floor": 1e-3, "leak_over_floor": 1.002}
]


def test_a_certificate_is_shown_where_there_is_one(tmp_path, made):
    text = written(tmp_path, made, certificate={"tensors": TENSORS, "faults": [], "kind": "certificate"})
    assert "<h2>Certificate</h2>" in text and "1 edited layer (2): everything holds" in parsed(text).text
    assert text.count("<svg xmlns") == PICTURES + 2
    faulty = {"tensors": TENSORS, "faults": ["layer 2 < layer 3"], "kind": "certificate"}
    assert "1 edited layer (2): 1 fault" in parsed(faulty_page := written(tmp_path, made, certificate=faulty)).text
    assert "<li class=bad>layer 2 &lt; layer 3</li>" in faulty_page


def test_modes_with_the_same_figures_share_their_rows(tmp_path, made):
    every = made | {("hook", language): cell for (mode, language), cell in made.items() if mode == "fused"}
    results = whole(every, controls=None)
    # One group, so it needs no name; each language once.
    assert differences(results).count("all together") == 1
    results["paired"][0]["delta"] += 0.1
    assert differences(results).count("all together") == 2


def test_the_texts_that_differ_come_first_and_modes_with_the_same_text_share_an_entry(made):
    every = made | {("hook", language): cell for (mode, language), cell in made.items() if mode == "fused"}
    found = list(entries(every, ["original", "fused", "hook"]))
    assert len(found) == 8 and all(entry.modes == ("fused", "hook") for entry in found)
    outcomes = [entry.outcome for entry in found if entry.language == "ar"]
    assert outcomes == ["right", "gained", "right", "lost"]
    section = changed_texts(every, ["original", "fused", "hook"], changed(pair(every)))
    assert section.count("<article") == 8 and section.index("· lost") < section.index("· gained")
    assert '<article class=pair lang="ar" data-kinds="differ lost">' in section
    assert changed_texts({key: cell for key, cell in made.items() if key[0] == "original"}, ["original"], {}) == ""


def test_a_long_run_shows_every_text_that_differs_up_to_a_limit_and_a_few_that_do_not():
    cell = [{"text": "the same", "correct": True, "prompt": f"p{i}", "answer": 1} for i in range(LIMIT + 50)]
    other = [sample | {"text": "another"} for sample in cell]
    section = changed_texts(
        {("original", "en"): cell, ("fused", "en"): other}, ["original", "fused"], {"fused": (0, 0)}
    )
    assert section.count("<article") == LIMIT and "Not on this page: 50 that differ; samples.jsonl has them." in section
    section = changed_texts(
        {("original", "en"): cell, ("fused", "en"): list(cell)}, ["original", "fused"], {"fused": (0, 0)}
    )
    assert section.count("<article") == SAME and section.count("<pre") == SAME, "an unchanged text is shown once"


def test_columns_of_numbers_and_of_words_keep_their_style_in_every_row():
    text = table(["mode", "n", "verdict"], [["a", "1", "fine"], ["b", "the same as all", "2"]], words=[2])
    assert text.count("<td class=n ") == 2 and text.count("<td class=k ") == 2 and text.count("<td data") == 2
    # A phone shows the column's name before each value.
    assert text.count('data-label="verdict"') == 2


@pytest.mark.parametrize(
    "before, after, one, other",
    [
        ("The answer is 12.", "The answer is 13.", "The answer is <mark>12</mark>.", "The answer is <mark>13</mark>."),
        ("答案是12", "答案是12", "答案是12", "答案是12"),
        ("答案是五", "答案为五", "答案<mark>是</mark>五", "答案<mark>为</mark>五"),
        ("a < b", "a", "a<mark> &lt; b</mark>", "a"),
        ("الجواب هو 4", "الجواب هو 5", "الجواب هو <mark>4</mark>", "الجواب هو <mark>5</mark>"),
    ],
)
def test_differences_are_marked_by_word(before, after, one, other):
    assert marked(before, after) == (one, other)


# Starts Chromium on the page, with every address but the page's own answered by a local server that counts.
BROWSE = """
import http.server, pathlib, subprocess, sys, tempfile, threading
browser, page = sys.argv[1:]
asked = []
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(404)
        self.end_headers()
    do_CONNECT = do_POST = do_GET
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tempfile.mkdtemp()}",
    f"--proxy-server=http://127.0.0.1:{server.server_port}", "--window-size=390,844", "--dump-dom"]
done = subprocess.run([browser, *options, pathlib.Path(page).as_uri()], capture_output=True, text=True, timeout=120)
asked = [path for path in asked if "google" not in path]  # the browser's own, at every start
print(len(asked), *asked, file=sys.stderr)
print(done.stdout)
"""


def test_a_browser_shows_it_and_asks_for_nothing(tmp_path, made):
    """In headless Chromium where there is one, at a phone's size; what a page without scripts can ask for stands in
    its text, and that is read here in any case (what the browser itself asks of its maker does not count)."""
    text = written(tmp_path, made)
    assert not re.findall(
        r"""(?:src|href|action|poster|srcset)\s*=\s*(?:["'](?!#)|(?![#"']))[^\s>]""", re.sub(r"xlink:href=.#", "", text)
    )
    assert not re.findall(r"@import|url\((?!#)", text) and "<iframe" not in text
    if (browser := found()) is None:
        return
    words = [sys.executable, "-c", BROWSE, browser, str(tmp_path / "report.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    asked = done.stderr.splitlines()[-1]
    print(f"asked for: {asked}")
    assert asked.split()[0] == "0", asked
    assert "Damage" in done.stdout and "Erasure" in done.stdout and done.stdout.count("<svg xmlns") == PICTURES
    # Teeth: a picture from elsewhere is seen, once the page's policy is gone, and the policy keeps it out.
    kept = text.replace("</body>", '<img src="http://pictures.invalid/x.png"></body>')
    (tmp_path / "report.html").write_text(kept, encoding="utf-8")
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert done.stderr.splitlines()[-1].split()[0] == "0"
    page = re.sub("<meta http-equiv[^>]*>", "", text).replace(
        "</body>", '<img src="http://pictures.invalid/x.png"></body>'
    )
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert "pictures.invalid" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(tmp_path, made, width):
    """In Chromium where there is one: no element is cut off, scrolled or beyond the edge, folded parts included."""
    every = {
        (mode, language): cell
        for mode in ("original", "hook", "baked", "fused", "lora")
        for language in ("ar", "en")
        for cell in [made["original" if mode == "original" else "fused", language]]
    }
    text = written(tmp_path, every, certificate={"tensors": TENSORS, "faults": [], "kind": "certificate"})
    assert "overflow-x" not in text
    # Points, of which 72 are an inch and 96 pixels. A phone has 390 pixels less a margin of 16 on either side.
    pictures = [float(points) * 96 / 72 for points in re.findall(r'<svg[^>]*? width="([\d.]+)pt"', text)]
    assert len(pictures) > 5 and max(pictures) <= 390 - 2 * 16, "a picture would be scaled down"
    if (browser := found()) is None:
        return
    count, which = too_wide(browser, tmp_path / "page.html", text, width)
    assert count == 0, which
    # Teeth: a wide element is seen.
    wider = text.replace("</body>", f"<div style='width:{width + 100}px'>x</div></body>")
    assert too_wide(browser, tmp_path / "page.html", wider, width)[0] > 0
