"""probe.json as one self-contained HTML page, report.html. Its building blocks are in `common.page`."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.intervals import Row, around_zero, forest
from kernel_surgery.common.page import PANEL, Card, contents, document, folded, opening, panels, paragraphs, table
from kernel_surgery.common.plotting import BAND, COLOURS, LIMIT, OTHER, figure, svg
from kernel_surgery.damage.words import RULE
from kernel_surgery.evaluation.report import TONES
from kernel_surgery.models.architectures import spans
from kernel_surgery.studies import probe_words as words
from kernel_surgery.studies.probe_words import EDIT, MORE, ORIGINAL, hidden, name_of, ranged
from kernel_surgery.studies.randoms import KINDS

REPORT = "report.html"
MUCH = 0.5  # of what a probe reads: from here on, the card that says so is green
MARKS = dict(zip(KINDS, ("x", "+", "1", "2"), strict=True))


def write_page(found: Mapping[str, Any], folder: Path) -> None:
    """Write the page into its folder."""
    write_atomic(folder / REPORT, page(found))


def page(found: Mapping[str, Any]) -> str:
    """Return the page: the verdict and two pictures, then every edit, every layer, and how it was run."""
    first = opening("Kernel Surgery · probe", f"Is it the language? {found['model']['id']}", *screen(found))
    parts = [
        ("Beside random edits", every_edit(found)),
        ("Layer by layer", table(*_split(words.layer_rows(found)))),
        ("How it was run", how(found)),
    ]
    probes, means = (by_layer(found, name) for name in ("probes", "left"))
    first += less_read(found) + panels([beside_random(found), probes, means])
    first += "".join(f"<p class=note>{html.escape(note)}</p>" for note in found["notes"])
    return document(f"Probe: {found['model']['id']}", first + contents(parts))


def screen(found: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str, list[Card]]:
    """Return what was edited, the verdict in a sentence, and its findings."""
    config, space, asked = found["config"], found["subspace"], found["asked"]
    edit, original, beside = found["measured"][EDIT], found["measured"][ORIGINAL], found["beside"]["all"]
    facts = [
        ("layers", f"{spans(space['layers'])} of {found['model']['layers']}"),
        ("rank", str(space["rank"])),
        ("method", str((space.get("fit") or {}).get("method", ""))),
        ("strength", f"{config['strength']:g}"),
        ("random edits", str(beside["probe"]["n"])),
        ("languages", ", ".join(asked["languages"])),
    ]
    last = list(edit["streams"])[-1]
    cards = [
        Card(
            "Language of a token, read by a linear probe at the edited layers",
            f"{edit['probe']:.3f} (original {original['probe']:.3f})",
            f"after random edits {ranged(beside['probe'])}; chance {asked['chance']:.3f}",
            "good" if found["verdict"] == MORE and hidden(found) >= MUCH else "",
        ),
        Card(
            "Covariance with the language that is left there",
            f"{edit['means']:.2f}",
            f"after random edits {ranged(beside['means'], '.2f')}",
        ),
        Card(
            f"The same probe in the residual stream, after layer {last}",
            f"{edit['streams'][last]:.3f} (original {original['streams'][last]:.3f})",
            "attention and the other layers write the language too",
        ),
        Card(
            "Damage",
            edit["word"] + words.of_the_word(found),
            words.damage_words(found).partition(": ")[2],
            TONES[edit["word"]],
        ),
    ]
    return facts, words.sentence(found), cards


def beside_random(found: Mapping[str, Any]) -> str:
    """Return the picture of all edits: their damage, and what the probe still reads."""
    from matplotlib.ticker import LogLocator, NullFormatter

    measured = found["measured"]
    edit, original = measured[EDIT], measured[ORIGINAL]
    made, (axes,) = figure(PANEL, 3.6)
    axes.axhline(original["probe"], color=COLOURS["original"], lw=1, label="original")
    axes.axhline(found["asked"]["chance"], color=LIMIT, lw=1, ls=":", label="chance")
    for kind in found["controls"]:
        points = [(by["damage"], by["probe"]) for name, by in measured.items() if name.partition(":")[0] == kind]
        axes.plot(*zip(*points, strict=True), MARKS[kind], ms=7, color=OTHER, label=f"random {KINDS[kind]}")
    axes.plot([edit["damage"]] * 2, edit["probe_ci95"], lw=1.5, color=COLOURS["fused"])
    axes.plot([edit["damage"]], [edit["probe"]], "D", ms=6, color=COLOURS["fused"], label="the fitted edit")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.03)
    axes.set_title("Damage, and what a probe reads", fontsize=10, loc="left")
    axes.set_xlabel("KL, nats per token, largest of the languages", fontsize=9)
    axes.set_ylabel("tokens whose language is read", fontsize=9)
    axes.margins(0.12)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return svg(made)


# {name of the figures by layer: (title, the axis' name)}.
BY_LAYER = {
    "probes": ("What a probe reads, layer by layer", "tokens whose language is read"),
    "left": ("What is left of the means", "covariance with the language, share left"),
}


def by_layer(found: Mapping[str, Any], of: str) -> str:
    """Return a picture by layer: of the original, of the edit, and of random edits. of: a name of `BY_LAYER`."""
    measured, (title, unit) = found["measured"], BY_LAYER[of]
    random = [by[of] for name, by in measured.items() if name not in (ORIGINAL, EDIT)]
    layers = list(measured[EDIT][of])
    at = [int(layer) for layer in layers]
    made, (axes,) = figure(PANEL, 3.6)
    low, high = ([extreme(by[layer] for by in random) for layer in layers] for extreme in (min, max))
    axes.fill_between(at, low, high, color=BAND, label="random edits")
    axes.plot(at, low, lw=0.8, color=OTHER)
    axes.plot(at, high, lw=0.8, color=OTHER)
    for name, colour in ((ORIGINAL, "original"), (EDIT, "fused")):
        line = [measured[name][of][layer] for layer in layers]
        label = "the fitted edit" if name == EDIT else name
        axes.plot(at, line, "o-", ms=3, lw=1.2, color=COLOURS[colour], label=label)
    if of == "probes":
        axes.axhline(found["asked"]["chance"], color=LIMIT, lw=1, ls=":", label="chance")
    axes.set_ylim(0, max(1.03, 1.03 * max(high)))
    axes.set_xticks(at if len(at) <= 10 else at[:: -(-len(at) // 9)])
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    made.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return svg(made)


def less_read(found: Mapping[str, Any]) -> str:
    """Return how the fitted edit's probe differs from the others', drawn around zero."""
    rows = [
        Row(
            f"than after {name_of(name)}" if name != ORIGINAL else "than without an edit",
            low,
            value,
            high,
            f"{value:+.3f}",
            "fused" if high < 0 else "other",
            name == ORIGINAL,
        )
        for name, (value, low, high) in found["difference"].items()
    ]
    unit = "accuracy of the probe, after the fitted edit minus after the other, with its 95% interval"
    return "<h3>What the probe reads less after the fitted edit</h3>" + forest(rows, around_zero(rows, unit, None))


def every_edit(found: Mapping[str, Any]) -> str:
    """Return the table of all edits, under what the figures are."""
    languages, layers = found["asked"]["languages"], list(found["measured"][EDIT]["streams"])
    head = ["edit", *(f"KL {language}" for language in languages), "in words", "probe", "95% interval", "means left"]
    head += [f"residual stream after {layer}" for layer in layers]
    body = []
    for name, by in found["measured"].items():
        body.append(
            [
                *(name_of(name), *(f"{by['kl'][language]:.4f}" for language in languages)),
                *(by["word"] if name != ORIGINAL else "", f"{by['probe']:.4f}"),
                *("{:.4f} to {:.4f}".format(*by["probe_ci95"]), f"{by['means']:.3f}"),
                *(f"{by['streams'][layer]:.4f}" for layer in layers),
            ]
        )
    summary = words.summary(found)
    said = [words.text_words(found), words.read_words(found), words.stream_words(found), words.rank_words(found)]
    explained = (
        "probe: held-out accuracy of a linear probe for the language of a token, mean over the edited layers, where "
        "the edit is made. means left: how much of the covariance with the language is left there. residual "
        f"stream: the same probe after a layer. {RULE}"
    )
    return (
        "".join(f"<p>{html.escape(line[0].upper() + line[1:])}.</p>" for line in said)
        + table(*_split(summary), words=(len(summary[0]) - 1,))
        + folded("Each edit, in each language", table(head, body, words=(1 + len(languages),)))
        + paragraphs([explained])
    )


def how(found: Mapping[str, Any]) -> str:
    """Return the command and the record."""
    command = found.get("command")
    record = {key: found[key] for key in ("config", "environment", "model", "asked", "controls")}
    return (f"<pre class=block>{html.escape(command)}</pre>" if command else "") + folded(
        "Record", f"<pre>{html.escape(json.dumps(record, indent=2, ensure_ascii=False))}</pre>"
    )


def _split(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return rows[0], rows[1:]
