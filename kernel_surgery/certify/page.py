"""A certificate as HTML: its section in an evaluation's report, and the page that `verify --out` writes."""

import html
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernel_surgery.certify import picture, render
from kernel_surgery.certify.tables import across_legend, across_sampled, across_table, counted
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.intervals import Axis, Row, forest
from kernel_surgery.common.page import Card, contents, document, folded, opening, panels, paragraphs, table
from kernel_surgery.common.plotting import standalone
from kernel_surgery.models.architectures import spans


def body(certificate: dict[str, Any]) -> str:
    """Return the verdict, the faults, the plots and the folded figures."""
    return (
        f"<p><strong>{html.escape(render.verdict(certificate))}</strong></p>"
        + faults(certificate)
        + plots(certificate)
        + folded("Figures", figures(certificate))
    )


def faults(certificate: dict[str, Any]) -> str:
    """Return the faults as a list, or nothing."""
    listed = "".join(f"<li class=bad>{html.escape(fault)}</li>" for fault in certificate["faults"])
    return f"<ul>{listed}</ul>" if listed else ""


def plots(certificate: dict[str, Any]) -> str:
    """Return the plots with their legend."""
    if certificate.get("across_engines"):
        return engine_modes(certificate["across_engines"])
    pictures, modes, marks = picture.panels(certificate)
    return panels(pictures, modes, marks)


def figures(certificate: dict[str, Any]) -> str:
    """Return the tables of a certificate."""
    out, model = "", certificate.get("model")
    if certificate["tensors"]:
        out += table(*render.tensor_table(certificate["tensors"]), keys=1, words=[1, 2])
    if model:
        out += paragraphs(render.sampled(model).split("\n"))
        out += "<p>Error over its bound, by layer (a check fails above 1, or above the limit that is named below):</p>"
        out += table(*render.layer_table(model), words=[len(model["modes"]) + 7]) + paragraphs(render.LAYER_LEGEND)
        out += "<p>Logits against the oracle's:</p>"
        out += table(*render.logit_table(model), keys=1, words=[1, 9]) + paragraphs(render.LOGIT_LEGEND)
    if across := certificate.get("across_engines"):
        out += paragraphs(across_sampled(across)) + table(*across_table(across))
        out += paragraphs(across_legend(across))
    return out


def engine_modes(across: dict[str, Any]) -> str:
    """Return how far each mode of an engine is from the exact edit, in yardsticks, with the limit."""
    rows = []
    for mode, row in across["modes"].items():
        rms, largest = row["rms_of_original"], row["max_of_original"]
        ends = min(rms, largest), rms, max(rms, largest)
        rows.append(Row(mode, *ends, f"{rms:.3g}, largest {largest:.3g}", "fused", True))
    reach = 1.1 * max([across["limit"], *(row.high for row in rows)])
    unit = "error of log probabilities, in yardsticks: root mean square, largest; a check fails beyond the line"
    return forest(rows, Axis(0.0, reach, unit, zero=across["limit"]))


def worst_checks(certificate: dict[str, Any]) -> list[Row]:
    """Return the largest error over its bound, by mode, over all edited layers and checks."""
    model, worst = certificate.get("model"), dict[str, float]()
    for row in (model or {}).get("layers", []):
        values = [row[key] for key in picture.CHECKS if row.get(key) is not None]
        worst[row["mode"]] = max([worst.get(row["mode"], 0.0), *values])
    tensors = certificate["tensors"] or (model or {}).get("tensors", [])
    if errors := [t["error_over_bound"] for t in tensors if t["error_over_bound"] is not None]:
        worst["files" if certificate["tensors"] else "baked weights"] = max(errors)
    colours = {"files": "baked", "baked weights": "baked"}
    return [Row(name, 0.0, v, v, f"{v:.3f}", colours.get(name, name), True) for name, v in worst.items()]


def _cards(certificate: dict[str, Any]) -> Iterator[Card]:
    faults, model = certificate["faults"], certificate.get("model")
    holds = render.holding(certificate) if not faults else counted(len(faults), "fault")
    yield Card("Is the edit exact?", holds, faults[0] if faults else "", "bad" if faults else "good")
    if rows := worst_checks(certificate):
        row = max(rows, key=lambda r: r.value)
        tone = "bad" if row.value > 1 else ""
        yield Card("Largest error over its bound", f"{row.value:.3f}", f"{row.label}; fails above 1", tone)
    if model:
        others = {mode: r["of_original"] for mode, r in model["logits"].items() if r.get("of_original") is not None}
        if others:
            mode = max(others, key=lambda name: others[name])
            words = f"{mode}, times the error of the original in {model['dtype']}"
            yield Card("Largest error of the logits", f"{others[mode]:.2f}", words)
    leaks = [t["leak_over_floor"] for t in certificate["tensors"] if t.get("leak_over_floor") is not None]
    if leaks:
        yield Card(
            "Subspace left in the files", f"{max(leaks):.3f}", "times what correct rounding leaves (at most 1.1)"
        )


def page(certificate: dict[str, Any]) -> str:
    """Return a certificate as a page of its own."""
    count, ran = len(certificate["faults"]), certificate.get("model") or certificate.get("across_engines") or {}
    name = str(certificate.get("model_id") or "an edited model")
    facts = [
        ("layers", spans(render.edited_layers(certificate))),
        *((key, f"{certificate[key]:g}") for key in ("rank", "strength") if certificate.get(key) is not None),
        *((key, str(ran.get(key, ""))) for key in ("engine", "dtype", "device")),
        ("modes", ", ".join(ran.get("modes", []))),
    ]
    words = f"{counted(count, 'check')} failed."
    if not count:
        holds = render.holding(certificate)
        exact = "The edit was made exactly: every check holds."
        words = exact if holds == render.WHOLE else f"{holds[0].upper()}{holds[1:]}."
    damage = certificate.get("damage_in_words", "")
    note = f"<p class=note>{html.escape(damage)}</p>" if damage else ""
    note += "".join(f"<p class=note>{html.escape(remark)}.</p>" for remark in certificate.get("remarks", []))
    rows = worst_checks(certificate)
    top = max([1.0, *(row.high for row in rows)]) * 1.1
    unit = "largest error over its bound, over all layers and checks; a check fails beyond the line"
    drawn = forest(rows, Axis(0.0, top, unit, zero=1.0)) if rows else ""
    first = opening("Kernel Surgery · certificate", name, facts, words, list(_cards(certificate)))
    command = certificate.get("command")
    about = {k: v for k, v in certificate.items() if k not in ("tensors", "model", "across_engines", "faults")}
    how = (f"<pre class=block>{html.escape(command)}</pre>" if command else "") + folded(
        "Record", f"<pre>{html.escape(json.dumps(about, indent=2, ensure_ascii=False))}</pre>"
    )
    sections = [
        ("Faults", faults(certificate)),
        # Without the original an adapter has no error to draw.
        ("By mode" if "across_engines" in certificate else "By layer", plots(certificate) if rows or ran else ""),
        ("Figures", figures(certificate)),
        ("How it was run", how),
    ]
    return document(f"Certificate: {name}", first + note + drawn + contents(sections))


def write(path: Path, certificate: dict[str, Any]) -> None:
    """Write the certificate as JSON, and beside it its plot (.svg) and its page (.html).

    A number that is not finite becomes null, because JSON cannot express it.
    """
    finite = _finite(certificate)
    # The JSON last: where it is, all are.
    write_atomic(path.with_suffix(".svg"), standalone(picture.plot(finite)))
    write_atomic(path.with_suffix(".html"), page(finite))
    write_atomic(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
