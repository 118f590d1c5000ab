"""The tables of docs/real.md, from what `bench.real` stored."""

import json
import statistics
from pathlib import Path

from bench import tables

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / "docs" / "real-smollm2.json"


def real(file: Path = SMOLLM2) -> str:
    """Every setting: damage per language, what is left, and what a probe reads. Empty if nothing is stored."""
    if not file.is_file():
        return ""
    stored = json.loads(file.read_text(encoding="utf-8"))
    languages = list(next(row["damage"] for row in stored["rows"] if row["damage"]))
    head = ["edit", "tokens", *(f"KL {x} (95% interval)" for x in languages), *(f"ppl {x}" for x in languages)]
    body = []
    for row in stored["rows"]:
        name = row["setting"] if row.get("yardstick") else row["setting"][0].upper() + row["setting"][1:]
        kl = [
            f"{r['kl_mean']:.3g} ({r['kl_ci95'][0]:.3g} to {r['kl_ci95'][1]:.3g})" for r in row["damage"].values()
        ] or ["-"] * len(languages)
        ratio = [f"{r['perplexity_ratio']:.3g}" for r in row["damage"].values()] or ["-"] * len(languages)
        left = "-"
        if "left" in row:
            layer, most = max(row["left"].items(), key=lambda item: item[1])
            left = f"{statistics.median(row['left'].values()):.1e}, {most:.1e} (layer {layer})"
        probes = ", ".join(f"{x:.3f}" for x in row["probes"].values()) if "probes" in row else "-"
        body.append([name, str(row.get("tokens", "-")), *kl, *ratio, row["word"] or "-", left, probes])
    return (
        tables.table([*head, "in words", "left", "probe"], body)
        + f"\n`{stored['command']}` on {stored['device']}, torch {stored['torch']}, commit {stored['commit'][:10]}, "
        f"{stored['date']}.\n"
    )
