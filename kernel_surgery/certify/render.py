"""Certificates as text: the tables in the terminal, with the verdict in the last line."""

import math
import re
from typing import Any

from kernel_surgery.certify.tables import (
    Table,
    across_legend,
    across_sampled,
    across_table,
    aligned,
    counted,
    number,
)
from kernel_surgery.models.table import without_number

ALIKE = 3  # faults of a kind that are printed; the JSON has every one


def tensor_table(rows: list[dict[str, Any]]) -> Table:
    """Return the names of the columns, and one row per edited tensor on disk.

    The experts of a layer share a row: of each figure it has the worst.
    """
    head = ["layer", "tensor", "dtype", "error/bound", "leak", "floor", "leak/floor", "leak if rounded to bfloat16"]
    keys = [("error_over_bound", ".3f"), ("leak", ".2e"), ("leak_floor", ".2e"), ("leak_over_floor", ".3f")]
    keys.append(("leak_bfloat16", ".2e"))
    head += ["edit's error", "format's rounding", "file's error", "file/format"]
    keys += [(key, ".2e") for key in ("edit_error", "rounding", "requantised")]
    keys.append(("requantised_over_rounding", ".3f"))
    lines = [
        [str(r["layer"]), r["tensor"], r["dtype"], *(number(r.get(key), form) for key, form in keys)]
        for r in grouped(rows)
    ]
    # Leave out columns that are empty in every row.
    columns = [i for i in range(len(head)) if i < 3 or any(row[i] != "-" for row in lines)]
    return [head[i] for i in columns], [[row[i] for i in columns] for row in lines]


# Figures that belong to one tensor together, each group after the ratio that says which tensor is the worst.
_TOGETHER = (
    ("error_over_bound",),
    ("leak_over_floor", "leak", "leak_floor"),
    ("leak_bfloat16",),
    ("requantised_over_rounding", "edit_error", "rounding", "requantised"),
)


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of tensors with one row for the experts of a layer, in the order of their first ones.

    Its "tensor" has a star for the number and says how many there are. Its figures are the worst expert's.
    """
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["layer"], without_number(row["tensor"]), row["dtype"]), []).append(row)
    found = []
    for (layer, name, dtype), group in alike.items():
        if len(group) == 1:
            found.append(group[0])
            continue
        worst = {"layer": layer, "tensor": f"{name} ({len(group)} experts)", "dtype": dtype}
        for first, *others in _TOGETHER:
            figures = max(group, key=lambda row: _severity(row.get(first)))
            worst |= {key: figures[key] for key in (first, *others) if key in figures}
        found.append(worst)
    return found


def _severity(value: float | None) -> float:
    if value is None:
        return -math.inf
    return math.inf if math.isnan(value) else value


def layer_table(model: dict[str, Any]) -> Table:
    """Return the names of the columns, and one row per edited layer.

    Every figure is an error over its bound, except the last two columns: leak / floor, and the hidden states' error
    over the original's.
    """
    modes: list[str] = model["modes"]
    by_layer: dict[int, dict[str, dict[str, Any]]] = {}
    for row in model["layers"]:
        by_layer.setdefault(row["layer"], {})[row["mode"]] = row
    hidden = {row["layer"]: row for row in model["hidden"]}
    head = ["layer", *modes, "rounded", "inside U", "left", "add", "norm", "worst pair", "modes", "W", "leak/floor"]
    head.append("hidden")
    lines = []
    for layer, rows in by_layer.items():
        pairs = [p for p in model["pairs"] if p["layer"] == layer]
        worst = max(pairs, key=lambda p: p["error_over_bound"], default=None)
        weights = [t for t in model["tensors"] if t["layer"] == layer]

        def largest(key: str, rows: list[dict[str, Any]]) -> float | None:
            return max((r[key] for r in rows if r.get(key) is not None), default=None)

        every = list(rows.values())
        errors = hidden[layer]
        lines.append(
            [str(layer)]
            + [number(rows[mode]["error_over_bound"]) for mode in modes]
            + [number(largest(key, every)) for key in ("rule_a", "span_rule_a", "span_leak", "add", "norm")]
            + ([number(worst["error_over_bound"]), "-".join(worst["pair"])] if worst else ["-", ""])
            + [number(largest("error_over_bound", weights)), number(largest("leak_over_floor", weights))]
            + [number(max(errors[mode] for mode in modes) / errors["original"])]
        )
    return head, lines


def logit_table(model: dict[str, Any]) -> Table:
    """Return the names of the columns, and one row per mode: the error of its logits against the oracle's."""
    head = ["mode", "run by", "logit error", "/original's", "largest", "KL mean", "KL p99", "top-1", "decoded"]
    head.append("greedy text")
    lines = []
    for mode, r in model["logits"].items():
        if mode == "ideal":  # a yardstick, not a mode
            continue
        text = "-"
        if mode != "original":
            differing = f"{r['diverged']} of {model['sampled']['prompts']} differ"
            text = "the same" if not r["diverged"] else f"{differing}, first at token {r['first']}"
        errors = (number(r["relative"], ".2e"), number(r.get("of_original")), number(r["max"], ".2e"))
        spread = (number(r["kl_mean"], ".1e"), number(r["kl_p99"], ".1e"), number(r["top1"], ".4f"))
        decoded = number((r["decoded"] or {}).get("of_original"))
        lines.append([mode, model["providers"].get(mode, "-"), *errors, *spread, decoded, text])
    return head, lines


LAYER_LEGEND = (
    "rounded: hook and fused against the exact edit of the rounded output. inside U: the same for rows inside the "
    "subspace. left: what is left of such rows.",
    "add, norm: fused with the residual addition and the norm. worst pair: modes that differ most. W: baked weights.",
    "leak/floor: the part of the subspace that is left in the weights, over what rounding alone leaves (limit: 1.1).",
    "hidden: the largest error of the hidden states, over the original model's own (limit: 2).",
)
LOGIT_LEGEND = (
    "logit error: root mean square difference, relative to the spread of the oracle's logits. /original's, decoded: "
    "that error over the original model's own, layer by layer and in the decoded text.",
    "KL: nats per position. top-1: share of positions with the same most likely token.",
)


def sampled(model: dict[str, Any]) -> str:
    """Return three lines that say what was run."""
    s = model["sampled"]
    tokens = counted(s["new_tokens"], "greedy token")
    return (
        f"{model['dtype']} on {model['device']}, compared with the exact edit in {model['oracle']} (the oracle).\n"
        f"Prompts: {s['prompts']}, {s['text']}. Each is followed by {tokens} of the oracle.\n"
        f"Positions compared with bounds: {s['rows_per_layer']} of {s['positions']} per layer. "
        + ("All layers were also" if s["decoded_whole"] else "The layers were not")
        + " edited at once and decoded token by token."
    )


def routing(model: dict[str, Any]) -> list[str]:
    """Return a line that says how experts were chosen, or none for a model without experts or an older certificate."""
    found = model.get("routing")
    if not found:
        return []
    most = max(found["differ"].values())
    return [
        f"Routing: {found['taken']} in every mode, also where all layers run at once. By itself a mode would choose "
        f"other experts in at most {most} of {found['decisions']} decisions."
    ]


def shown(certificate: dict[str, Any]) -> str:
    """Return the tables as text, with the verdict in the last line."""
    lines, faults = [], certificate["faults"]
    if certificate["tensors"]:
        lines += [*aligned(*tensor_table(certificate["tensors"]), left=3), ""]
    if model := certificate.get("model"):
        lines += [sampled(model), *routing(model)]
        lines += [f"{mode} left out: {why}" for mode, why in model["left_out"].items()]
        lines += [certificate["note"]] if certificate.get("note") else []
        lines += ["", "Error over its bound, by layer (a check fails above 1, or above the limit that is named below):"]
        lines += [*aligned(*layer_table(model)), *LAYER_LEGEND]
        lines += ["", "Logits against the oracle's:", *aligned(*logit_table(model), left=2), *LOGIT_LEGEND, ""]
    if across := certificate.get("across_engines"):
        lines += [*across_sampled(across), *aligned(*across_table(across)), *across_legend(across), ""]
    lines += [certificate["note"]] if certificate.get("note") and not model else []
    lines += [f"remark: {remark}" for remark in certificate.get("remarks", [])]
    lines += [f"fault: {fault}" for fault in few(faults)]
    return "\n".join([*lines, verdict(certificate)])


def few(faults: list[str]) -> list[str]:
    """Return the faults. Of those that differ in names and figures alone, the first few and how many more there are."""
    alike: dict[str, list[str]] = {}
    for fault in faults:
        alike.setdefault(re.sub(r"\S*[\d._]\S*", "", fault), []).append(fault)
    lines = []
    for same in alike.values():
        more = len(same) - ALIKE
        lines += [*same[:ALIKE], f"{more} more like these"] if more > 1 else same
    return lines


def edited_layers(certificate: dict[str, Any]) -> list[int]:
    """Return the layers that a certificate is about, in order."""
    rows = [*certificate["tensors"], *(certificate.get("model") or {}).get("layers", [])]
    return sorted({row["layer"] for row in rows}) or certificate.get("layers", [])


def verdict(certificate: dict[str, Any]) -> str:
    """Return what was checked and the result, in one line."""
    faults, edited = certificate["faults"], edited_layers(certificate)
    what = counted(len(edited), "edited layer") + (f" ({', '.join(map(str, edited))})" if edited else "")
    what += "".join(f", {key} {certificate[key]:g}" for key in ("rank", "strength") if certificate.get(key) is not None)
    return f"{what}: " + (counted(len(faults), "fault") if faults else holding(certificate))


WHOLE = "everything holds"


def holding(certificate: dict[str, Any]) -> str:
    """Return what a certificate without a fault says. Some checks of an adapter or a restored folder need the original.
    """
    of = certificate.get("of", {})
    if of.get("model") is None and {"adapter", "restored"} & of.keys():
        return "what can be checked without the original holds"
    return WHOLE
