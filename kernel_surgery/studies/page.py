"""study.json as one self-contained HTML page, report.html. Its building blocks are in `common.page`."""

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.intervals import Axis, Row, around_zero, forest
from kernel_surgery.common.page import Card, contents, document, folded, opening, panels, table
from kernel_surgery.damage.words import RULE
from kernel_surgery.evaluation import sections
from kernel_surgery.evaluation.report import TONES, differences, outcome, worst_word
from kernel_surgery.studies.front import difference_in_words, pictures

REPORT = "report.html"


def write_page(study: Mapping[str, Any], folder: Path) -> None:
    """Write the page of a study into its folder."""
    write_atomic(folder / REPORT, page(study))


def page(study: Mapping[str, Any]) -> str:
    """Return the page: what was chosen and how, the verdict on test, and everything that was tried on dev."""
    searched, declared = "search" in study, study["declared"]
    first = search_screen(study) if searched else grid_screen(study)
    results = {"damage": study.get("damage"), "controls": study.get("controls")}
    parts = [
        *(_searched(study) if searched else _tried(study)),
        ("Damage", sections.damage(results)),
        ("Controls", sections.control_figures(results)),
        ("How it was run", how(study)),
    ]
    return document(f"{'Search' if searched else 'Study'}: {declared['model']}", first + contents(parts))


def facts(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was studied: (name, value)."""
    declared = study["declared"]
    tried = len(study["search"]["rows"]) - 1 if "search" in study else len(study["dev"]) - 1
    return [
        ("model", str(declared["model"])),
        ("settings tried on dev", str(tried)),
        ("languages", ", ".join(declared.get("languages", []))),
        ("mode", str(declared.get("mode", ""))),
        ("choice frozen as", study["frozen"]["sha256"][:16]),
    ]


def _damage_card(study: Mapping[str, Any]) -> list[Card]:
    if (word := worst_word(study)) is None:
        return []
    figures = max(study["damage"]["neutral"].values(), key=lambda by: max(r["kl_mean"] for r in by.values()))
    kl = ", ".join(f"{language} {r['kl_mean']:.3g}" for language, r in figures.items())
    return [Card("Damage of the choice", word, f"KL {kl} nats per token", TONES[word])]


def grid_screen(study: Mapping[str, Any]) -> str:
    """Return the first screen of a grid: the choice, and the paired differences on test around zero."""
    paired, chosen = study["paired"], study["frozen"]["cell"]
    mine = [r for r in paired if r["mode"] == chosen]
    said = outcome(mine) if mine else "no comparison on test"
    cards = [
        Card("Chosen on dev", chosen, "the highest mean accuracy; ties go to the first declared"),
        Card("On test", said, f"corrected for all {len(paired)} comparisons"),
        *_damage_card(study),
    ]
    verdict = f"Chosen: {chosen}. On test: {said}."
    title = f"Study of {study['declared']['model']}"
    return opening("Kernel Surgery · study", title, facts(study), verdict, cards) + (
        differences({"paired": mine}) if mine else ""
    )


def varying(names: Iterable[str]) -> dict[str, str]:
    """Return {name: the words of it that not all names share}, for settings named "rank=1 site=mlp_out ..."."""
    words = {name: name.split() for name in names}
    common = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
    return {name: " ".join(word for word in own if word not in common) or name for name, own in words.items()}


def _tried(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sections of all cells of a grid: on dev, and on test if more than the choice was asked there."""
    rows, short = [], varying(name for name in study["dev"] if name != "original")
    for name, by in study["dev"].items():
        for language, r in by.items():
            words = f"{r['correct']}/{r['n']}"
            colour = "original" if name == "original" else "fused"
            strong = name == study["frozen"]["cell"]
            rows.append(
                Row(short.get(name, name), r["ci95"][0], r["accuracy"], r["ci95"][1], words, colour, strong, language)
            )
    rows.sort(key=lambda row: row.group)
    axis = Axis(0.0, 1.0, "accuracy on dev, with its 95% interval")
    paired = study["paired"]
    every = differences({"paired": paired}, short) if len({r["mode"] for r in paired}) > 1 else ""
    return [("All settings on dev", forest(rows, axis)), ("All settings on test", every)]


def search_screen(study: Mapping[str, Any]) -> str:
    """Return the first screen of a search: the choice beside the baseline on test, and the pictures."""
    search, measured = study["search"], study["measured"]
    chosen = next(row for row in search["rows"] if row["number"] == search["chosen"])
    by, base = measured["chosen"], measured["baseline"]
    kl = ", ".join(f"{language} {value:.3g}" for language, value in by["kl"].items())
    before = ", ".join(f"{language} {value:.3g}" for language, value in base["kl"].items())
    cards = [
        Card("Damage on test", by["word"], f"KL {kl} nats per token", TONES.get(by["word"], "")),
        Card("The baseline's damage", base["word"], f"KL {before} nats per token", TONES.get(base["word"], "")),
        Card(
            "Language, read by a linear probe",
            f"{by['probe']:.3f} (baseline {base['probe']:.3f})",
            f"original {measured['original']['probe']:.3f}",
        ),
    ]
    ratio = "{:.2f} ({:.2f} to {:.2f})".format(*_ratio(study)) if _ratio(study) else ""
    less = f" On test it does {ratio} times the damage of the baseline." if ratio else ""
    return (
        opening(
            "Kernel Surgery · search",
            f"Search on {study['declared']['model']}",
            facts(study),
            f"Chosen: {chosen['name']}.{less}",
            cards,
        )
        + paired_damage(study)
        + panels(pictures(study))
    )


def _ratio(study: Mapping[str, Any]) -> list[float]:
    """Return the ratio of the choice's damage to the baseline's in the worst language: [ratio, low, high], or []."""
    found = [ratio for ratio in study["difference"]["damage"].values() if ratio]
    return max(found, key=lambda ratio: ratio[0], default=[])


def paired_damage(study: Mapping[str, Any]) -> str:
    """Return how the choice's probe differs from the baseline's, drawn around zero."""
    value, low, high = study["difference"]["probe"]
    row = Row("chosen", low, value, high, f"{value:+.4f}", "fused", True)
    unit = "accuracy of the probe, the choice minus the baseline, with its 95% interval"
    return f"<h3>Beside the baseline ({html.escape(study['search']['baseline'])})</h3>" + forest(
        [row], around_zero([row], unit, None)
    )


def _searched(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the sections of a search: the figures on test, and all settings on dev."""
    search, measured = study["search"], study["measured"]
    languages = list(measured["original"]["kl"])
    head = ["edit, on test", *(f"KL {language}" for language in languages), "probe", "95% interval", "means left"]
    body = [
        [
            *(name, *(f"{by['kl'][language]:.4f}" for language in languages)),
            *(f"{by['probe']:.4f}", "{:.4f} to {:.4f}".format(*by["probe_ci95"]), f"{by['means']:.3f}"),
            by["word"] if name != "original" else "",
        ]
        for name, by in measured.items()
    ]
    objectives = list(dict.fromkeys([*search["objectives"], "damage", "probe", "means"]))
    tried = [
        [row["name"], *(f"{row[name]:.4f}" if name in row else "-" for name in objectives), _kind(row, search)]
        for row in sorted(search["rows"], key=lambda row: row.get(search["objectives"][0], float("inf")))
    ]
    words = (
        f"<p>Beside the baseline: {html.escape(difference_in_words(study['difference']))}. The intervals are 95%, each "
        "its own, paired over sentences and problems.</p><p class=small>probe: held-out accuracy of a linear probe "
        "for the language over prompt tokens, at the MLPs' outputs of the baseline's layers. means left: how much of "
        f"the covariance with the language is left there. {html.escape(RULE)}</p>"
    )
    rule = f"<p>{html.escape(search['rule'])}. The choice was frozen before any figure of the test half was taken.</p>"
    return [
        ("On test", words + table([*head, "in words"], body, words=(len(head),))),
        (
            "All settings on dev",
            rule + folded("Settings", table(["setting", *objectives, ""], tried, words=(0, len(objectives) + 1))),
        ),
    ]


def _kind(row: Mapping[str, Any], search: Mapping[str, Any]) -> str:
    kinds = ["chosen"] * (row["number"] == search["chosen"]) + ["baseline"] * (row["number"] == -1)
    kinds += ["front"] * (row["number"] in search["front"])
    kinds += [f"refused: {row['refused'].splitlines()[0]}"] if "refused" in row else []
    return ", ".join(kinds)


def how(study: Mapping[str, Any]) -> str:
    """Return the notes, the command and the declaration."""
    command = study.get("command")
    record = {key: study.get(key) for key in ("declared", "frozen", "environment")}
    return (
        f"<p>{html.escape(study.get('damage_in_words', ''))}</p>"
        + "".join(f"<p class=note>{html.escape(note)}</p>" for note in study.get("notes", []))
        + (f"<pre class=block>{html.escape(command)}</pre>" if command else "")
        + folded("Declaration", f"<pre>{html.escape(json.dumps(record, indent=2, ensure_ascii=False))}</pre>")
    )
