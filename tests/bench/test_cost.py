"""The cost model: its arithmetic against a case by hand, and its predictions against runs."""

import json
from pathlib import Path

import pytest

from bench import cost, pages, store, tables
from bench.cost import Law, Model, Rates

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model.dense("small", 4, 8, 16, 4, 10, False)
LAWS = {"moments": Law((4, 8), (1, 4)), "fit": Law((2, 4, 8), (0.125, 1, 8)), "peak": Law((4, 8), (16, 64))}
RATES = Rates(cpu=100, prefill=1000, decode=10, copy=50, tokens=7, **LAWS)


def test_a_models_parameters_are_counted():
    layer = 8 * 8 + 8 * 8 + 8 * 4 + 8 * 4 + 3 * 8 * 16  # queries, output, keys, values, MLP
    assert (MODEL.body, MODEL.active, MODEL.total, MODEL.edited) == (4 * layer, 4 * layer + 80, 4 * layer + 160, 2)
    qwen, llama, _ = cost.TARGETS
    assert qwen.total == qwen.active and llama.total - llama.active == 128256 * 8192
    # What the models' authors say, and what the embedded one has. Norms and biases are left out.
    assert (qwen.total, llama.total) == (pytest.approx(3.09e9, rel=0.005), pytest.approx(70.6e9, rel=0.005))
    known = json.loads((tables.RESULTS / "eval-polyglot.json").read_text(encoding="utf-8"))["model"]["parameters"]
    assert cost.POLYGLOT.total == pytest.approx(known, rel=0.01)


def test_the_costs_of_a_small_model_are_those_computed_by_hand():
    found = cost.costs(MODEL, RATES)
    assert MODEL.body == 2304  # 4 x 576
    by_hand = {
        "weights": 2 * 2464,
        "collect operations": 32256,  # 2 x 2304 x 7
        "collect on the GPU": 32.256,
        "collect on a core": 322.56,
        "moments operations": 3584,  # 2 x 7 x 8 x 8 x 4
        "moments on a core": 112,  # 4 s x 7 x 4
        "moments bytes": 2048,  # 8 x 8 x 8 x 4
        "devices": 1,
        "fit of a layer": 8,
        "fit of a layer, least": 8,  # measured at this width
        "fit of a layer, most": 8,
        "fit": 16,
        "fit bytes": 2112,
        "new tokens": 512000,  # 200 x 2 x 5 x 256
        "eval operations": 2 * 2384 * 512000,
        "eval least": 10240 * 2 * 2384 / 50,  # 4 batches x 2 languages x 5 modes x 256
        "eval on the GPU": 10240 * 2 * 2384 * 64 / 10,
    }
    assert found == pytest.approx(by_hand)


def test_a_mixture_of_experts_reads_between_its_active_and_all_its_weights():
    found = cost.costs(Model("experts", 4, 8, 1e6, 2000, 2000), RATES)
    assert found["eval least"] == 10240 * 2 * 2000 / 50 and found["eval on the GPU"] == 10240 * 2e6 / 50
    assert found["collect operations"] == 2 * 2000 * 7


def test_a_law_starts_at_the_nearest_width_and_follows_the_fitted_exponent():
    law = LAWS["fit"]
    assert law.exponent == pytest.approx((3, 0), abs=1e-9)
    assert (law.at(4), law.at(16)) == pytest.approx((1, 64)) and law.at(16, 2.0) == pytest.approx(32)
    assert law.at(6) == pytest.approx(8 * (6 / 8) ** 3) and law.at(5) == pytest.approx((5 / 4) ** 3)


def test_the_predictions_are_within_a_factor_of_two_where_operations_decide():
    ratios = {what: predicted / measured for what, predicted, measured in cost.checks(cost.rates())}
    print(ratios)
    for what in ("collect, SmolLM2", "collect, SmolLM2, what moments add", "fit, SmolLM2-135M's width"):
        assert 0.5 <= ratios[what] <= 2, what
    # The rates come from other runs than those that are predicted.
    used = {row["run"] for name in ("model-stack.json", "growth-moments.json") for row in tables.rows(name)}
    assert not used & {row["run"] for name in ("collect.json", "cost.json") for row in tables.rows(name)}


def test_the_page_follows_the_stored_rows(monkeypatch):
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert pages.renewed(text, pages.SECTIONS["docs/scale.md"]) == text
    rows = tables.rows

    def slower(name):
        return [r | {"cpu_us_p50": 1.5 * r["cpu_us_p50"]} if r["case"] == "oblique" else r for r in rows(name)]

    monkeypatch.setattr(tables, "rows", lambda name: slower(name) if name == "growth-moments.json" else rows(name))
    assert pages.renewed(text, pages.SECTIONS["docs/scale.md"]) != text


def test_rates_of_another_device_take_the_place_of_those_measured(capsys):
    assert cost.run([]) == 0
    stored = capsys.readouterr().out
    operations = cost.costs(cost.TARGETS[1], cost.rates())["collect operations"]
    assert cost.run(["--tflops", "100", "--gbps", "1000"]) == 0
    own = capsys.readouterr().out
    assert "In place of an H200: prefill 1e+14/s, copy 1e+12/s" in own and cost.long(operations / 1e14) in own
    assert cost.long(operations / 1e14) not in stored


@pytest.mark.slow
def test_what_the_predictions_are_compared_with_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 1)
    assert cost.run(["--measure", "--out", str(tmp_path / "cost.json")]) == 0
    found = store.read(tmp_path / "cost.json")
    assert [(row["case"], row["d"], row["layers"]) for row in found] == [
        ("collect", 128, 8),
        ("fit", 128, 4),
        ("fit", 576, 14),
    ]
    assert all(row["cpu_us_p50"] > 0 for row in found) and found[0]["tokens"] > 1400
