"""The page of a certificate says what the certificate says: the verdict, the worst figure, every fault."""

import copy
import json
from pathlib import Path

import pytest

from kernel_surgery.certify.page import page, worst_checks

KEPT = Path(__file__).resolve().parent.parent / "data" / "before" / "bundle" / "certificate.json"


@pytest.fixture
def certificate():
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_a_certificate_that_holds_says_so_and_names_its_worst_figure(certificate):
    text = page(certificate)
    assert "The edit was made exactly: every check holds." in text and "<h2>Faults</h2>" not in text
    worst = max(worst_checks(certificate), key=lambda row: row.value)
    assert 0 < worst.value <= 1 and f"<strong>{worst.value:.3f}</strong>" in text and f"{worst.label}; fails" in text
    modes = {row["mode"] for row in certificate["model"]["layers"]}
    assert modes <= {row.label for row in worst_checks(certificate)}


def test_every_fault_is_on_the_page_and_the_first_screen_says_how_many(certificate):
    broken = copy.deepcopy(certificate)
    broken["faults"] = ["layer 2, fused: <too large>", "layer 3: another"]
    broken["model"]["layers"][0]["error_over_bound"] = 7.5
    text = page(broken)
    first, _, rest = text.partition("<nav>")
    assert "2 checks failed." in first and "2 faults" in first and "7.500" in first
    assert "layer 2, fused: &lt;too large&gt;" in rest and "layer 3: another" in rest and "<too large>" not in text
