"""The whole-model benchmark: every method makes the edit, and one that does not is not timed."""

import pytest
import torch

from bench import timing
from kernel_surgery.common.errors import UserError


@pytest.fixture(scope="module")
def small():
    """(model, bases, oracle) with four layers, two of them edited."""
    from bench import model, opcount, shapes

    made = shapes.random_model(torch.float32, "cpu", **opcount.SMALL, num_hidden_layers=4, vocab_size=64)
    bases = shapes.random_bases(made)
    return made, bases, model.Oracle(made, bases, tokens=16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_provider_computes_the_edit_and_an_unedited_one_is_not_timed(small, phase):
    from bench import logits, methods, model

    made, bases, oracle = small
    names = [name for name in methods.NAMES if name not in methods.missing(made.dtype)]
    with methods.opened(made, bases, names) as calls:
        calls["nothing"] = calls["original"]
        rows = model.measure(calls, oracle, (phase, 2, 16), "eager", 2, 10.0)
    found = {row["provider"]: row for row in rows}
    assert list(found) == [*names, "nothing"] and methods.missing() == {}
    for name, row in found.items():
        print(f"{phase} {name}: error/bound {row['error_over_bound']:.2f}")
        assert (row["error_over_bound"] <= 1) == (row["left_out"] is None) == (name != "nothing")
        assert row["left_out"] is None or row["left_out"] == "its logits exceed their bound" in model.row_text(row)
    # Sharing weights is not sharing edits: the model itself is as it was.
    ids = model.prompts(made, 2, 16)
    exact = oracle.logits(ids)["original"]
    assert oracle.error_over_bound("original", logits.last_logits(made, ids)[:, -1], {"original": exact}) <= 1


@pytest.mark.slow
def test_compiled_providers_do_not_run_each_others_graphs(small, monkeypatch):
    """Dynamo keeps graphs by code object and does not look at hooks: steps that share one run the last one's graph."""
    from bench import methods, model

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    made, bases, oracle = small
    names = [name for name in methods.NAMES if name not in methods.PEERS]
    with methods.opened(made, bases, names) as calls:
        rows = model.measure(calls, oracle, ("prefill", 1, 8), "compile", 1, 10.0)
        assert {row["provider"]: row["left_out"] for row in rows} == dict.fromkeys(names)
        assert {row["provider"]: row["graph_breaks"] for row in rows} == dict.fromkeys(names, 0)
        few = {name: calls[name] for name in ("original", timing.NOISE, "hook", "fused")}
        # Compiled and then captured: what is captured is the compiled function (a stand-in for CUDA's capture here).
        captured = []
        monkeypatch.setattr(model, "graphed", lambda run, before: captured.append(run) or run)
        rows = model.measure(few, oracle, ("prefill", 1, 8), "compile+graph", 1, 10.0)
        assert [(row["left_out"], row["graph"], row["graph_breaks"]) for row in rows] == [(None, True, 0)] * 4
        assert len(captured) == 4 and all(hasattr(run, "_torchdynamo_orig_callable") for run in captured)
        # The check can fail: one function for all.
        monkeypatch.setattr(model, "prepared", lambda name, step, how: torch.compile(step, dynamic=False))
        rows = model.measure(few, oracle, ("prefill", 1, 8), "compile", 1, 10.0)
        assert "its logits exceed their bound" in [row["left_out"] for row in rows]
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_status_is_1_where_a_mode_of_ours_was_not_timed_and_0_where_it_is_exact(small, monkeypatch):
    from bench import model

    made, bases, oracle = small
    monkeypatch.setattr(model, "load", lambda *args: (made, bases))
    monkeypatch.setattr(model, "Oracle", lambda *args: oracle)
    for left_out, provider, status in ((None, "fused", 0), ("breaks", "fused", 1), ("breaks", "addmm hook", 0)):
        row = {"provider": provider, "left_out": left_out, "error_over_bound": 0.0, "launches": None, "us_p50": 1.0}
        row |= {"us_added": 0.0, "graph_breaks": None, "goal_met": None, "detectable": 0.01, "run": "1"}
        row |= {"ratio": 1.0, "ratio_ci95": None, "ratio_range": [1.0, 1.0], "verdict": "-"}
        monkeypatch.setattr(model, "measure", lambda *args, row=row: [row])
        assert model.run(["--case", "layer", "--device", "cpu", "--methods", "hook"]) == status


def test_the_goal_is_met_only_where_the_whole_interval_meets_it():
    from bench import model

    for ends, met in (((0.99, 1.01), True), ((0.99, 1.0102), False), ((1.0, 1.0), True)):
        assert model.goal_met({"ratio_ci95": ends, "ratio_range": (0.5, 2)}) == met
    assert not model.goal_met({"ratio_ci95": None, "ratio_range": (0.9, 1.2)})


def test_a_captured_step_runs_the_attention_that_is_run_without(small, monkeypatch):
    """transformers builds another mask, and repeats the heads, where it sees a graph being captured."""
    from bench import methods, model

    made, _, _ = small
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v, attn_mask=None, **options):
        seen.append((q.shape, k.shape, None if attn_mask is None else attn_mask.shape, options))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = model.prompts(made, 2, 16)
    with methods.opened(made, {}, ["original"]) as calls:
        for phase in ("prefill", "decode"):
            step = model.Step(calls["original"], phase, ids, room=8)
            found = []
            for capturing in (False, True):
                monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
                seen.clear()
                found.append(step())
                found.append(list(seen))
                step.rewind()
            eager, ran, captured, ran_captured = found
            assert torch.equal(eager, captured) and ran == ran_captured and len(ran) == 4
            assert (ran[0][2] is None) == ran[0][3]["is_causal"] == (phase == "prefill")


def test_a_way_that_is_not_there_is_refused_and_what_cannot_be_captured_says_so(small, monkeypatch):
    from bench import methods, model

    for words in (["--how", "graph", "--device", "cpu"], ["--how", "nonsense", "--device", "cpu"]):
        with pytest.raises(UserError, match=r"choose eager or compile, or on CUDA also graph or compile\+graph"):
            model.run(words)
    with pytest.raises(UserError, match=r"--only 'decode:2:1': layer has prefill:1:128, decode:1:128\. Nothing"):
        model.run(["--case", "layer", "--device", "cpu", "--only", "decode:2:1"])
    made, bases, oracle = small

    def failing(name, step, how):
        raise ValueError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(model, "prepared", failing)
    with methods.opened(made, bases, ["original", timing.NOISE, "hook"]) as calls:
        rows = model.measure(calls, oracle, ("prefill", 1, 8), "graph", 1, 10.0)
    assert {row["left_out"] for row in rows} == {"graph: ValueError: operation not permitted when stream is capturing"}
    assert "not permitted" in model.row_text(rows[0])
