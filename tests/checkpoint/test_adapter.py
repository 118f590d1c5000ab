"""The adapter: exact at the real layer shape, what PEFT makes of it, what is written, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import Subspace, adapted, baked, lora, verify
from kernel_surgery.certify.files import verify_adapter
from kernel_surgery.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, write_adapter
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.common.errors import UserError
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.lora import add_pair, lora_pair, padded_rank
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.numerics.bounds import adapter_bound, applied_bound, baked_element_bound, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle, exact_output
from kernel_surgery.numerics.rounding import ulp, underflow, unit_roundoff
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis, pico

D, D_FF, K = 2048, 11008, 10
LAYERS = (1, 2)
DOWN = "model.layers.{}.mlp.down_proj.weight"
A, B = (PREFIX + "model.layers.{}.mlp.down_proj." + f"lora_{part}.weight" for part in "AB")


def saved(folder, dtype=torch.bfloat16, shards="5GB", **options):
    """(model, Subspace) of a checkpoint written to folder / "source", the subspace beside it."""
    model = pico("qwen2", dtype=dtype, **options)
    model.save_pretrained(folder / "source", max_shard_size=shards)
    subspace = Subspace({i: basis(48, 5, i) for i in LAYERS}, site="mlp_out", fingerprint=fingerprint(model))
    subspace.save(folder / "subspace.safetensors")
    return model, subspace


def ids():
    return torch.arange(1, 25).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [1.0, *(pytest.param(a, marks=pytest.mark.slow) for a in (0.5, 2.0))])
def test_a_real_layer_meets_its_bound_and_agrees_with_hook_and_baked(dtype, strength):
    torch.manual_seed(0)
    weight = (torch.randn(D, D_FF) * D_FF**-0.5).to(dtype)
    h = (torch.randn(16, D_FF) * torch.nn.functional.silu(torch.randn(16, D_FF))).to(dtype)
    u = basis(D, K)
    pair = lora_pair(weight, u, strength)
    a, b = pair.a, pair.b
    inside = u.double().T @ weight.double()
    ratio = worst_ratio((a.double() - strength * inside).abs(), adapter_bound(weight, strength))
    print(f"{dtype} a={strength} A: error/bound {ratio:.3f}")
    assert ratio <= 1 and torch.equal(b, -u)
    x, exact = h @ weight.T, exact_output(weight, h, u, strength)
    bounds = {m: applied_bound(m, exact, u, D_FF, dtype, strength) for m in ("hook", "baked", "lora")}
    forms = {
        "hook": project_eager(x, u, strength),
        "baked": h @ bake_weight(weight, u, strength).T,
        "lora": add_pair(x, pair.a, pair.b, h),
    }
    for mode, y in forms.items():
        ratio = worst_ratio((y.double() - exact.y).abs(), bounds[mode])
        apart = worst_ratio((y.double() - forms["lora"].double()).abs(), bounds[mode] + bounds["lora"])
        print(f"{dtype} a={strength} {mode}: error/bound {ratio:.3f}, of lora {apart:.3f}")
        assert max(ratio, apart) <= 1
    # Teeth: the sign, the strength, a column forgotten; and in float32 an adapter of 16 bits.
    wrong = {
        "B = +U": (a, u),
        "strength ignored": (a / strength * 0.9, b),
        "a column forgotten": (a[:-1], b[:, :-1]),
    }
    if dtype == torch.float32:
        wrong["A in bfloat16"] = (a.bfloat16().float(), b)
    for name, (wrong_a, wrong_b) in wrong.items():
        y = add_pair(x, wrong_a, wrong_b, h)
        ratio = worst_ratio((y.double() - exact.y).abs(), bounds["lora"])
        print(f"{dtype} a={strength} {name}: error/bound {ratio:.1f}")
        assert ratio > 1


@pytest.mark.parametrize("k, rank", [(1, 8), (8, 8), (9, 16), (10, 16), (64, 64), (257, 320), (512, 512)])
def test_the_rank_is_filled_up_to_one_that_engines_take(k, rank):
    assert padded_rank(k) == rank


def test_a_rank_that_no_engine_takes_is_refused():
    with pytest.raises(ValueError, match="no engine takes an adapter of rank 513: at most 512"):
        padded_rank(513)


def peft_model(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_peft_loads_it_and_computes_what_our_lora_mode_does(tmp_path, dtype, shards):
    model, subspace = saved(tmp_path, dtype, shards)
    plain = logits(model)
    with baked(model, subspace, 0.5):
        weights = {i: site.module.weight.detach().clone() for i, site in mlp_outputs(model, LAYERS).items()}
    originals = {i: site.module.weight.detach().clone() for i, site in mlp_outputs(model, LAYERS).items()}
    h = torch.randn(16, 96).to(dtype)
    with adapted(model, subspace, 0.5), torch.no_grad():
        ours = {i: site.module(h) for i, site in mlp_outputs(model, LAYERS).items()}
    assert write_adapter(tmp_path / "source", subspace, tmp_path / "adapter", strength=0.5) == 8
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["layers_to_transform"] == [1, 2]
    theirs = peft_model(model, tmp_path / "adapter")
    names = [n for n, _ in theirs.named_modules() if n.endswith("down_proj.lora_A.default")]
    assert names == [f"base_model.model.model.layers.{i}.mlp.down_proj.lora_A.default" for i in LAYERS]
    # Layer by layer, on the same input: both are the adapter's arithmetic, each within its bound of the exact edit.
    for i in LAYERS:
        exact = exact_output(originals[i], h, subspace.bases[i], 0.5)
        bound = applied_bound("lora", exact, subspace.bases[i], 96, dtype, 0.5)
        with torch.no_grad():
            y = theirs.base_model.model.model.layers[i].mlp.down_proj(h)
        ratio = worst_ratio((y.double() - exact.y).abs(), bound)
        apart = worst_ratio((y.double() - ours[i].double()).abs(), 2 * bound)
        unedited = worst_ratio((y.double() - exact.x).abs(), bound)
        print(f"{dtype} layer {i}: PEFT's error/bound {ratio:.3f}, from ours {apart:.3f}, from no edit {unedited:.0f}")
        assert ratio <= 1 and apart <= 1 and unedited > 1
    # Off for a request, and on again.
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs), plain)
    # Merged, PEFT rounds W + B A once, as bake does. The two can part only where float32's part of the error, e, takes
    # them to different sides of a rounding boundary: a share of 2 e / ulp of the elements, and five deviations of it.
    merged = theirs.merge_and_unload()
    for i, site in mlp_outputs(merged, LAYERS).items():
        bound = baked_element_bound(originals[i], subspace.bases[i], 0.5)
        found, exact = site.module.weight, bake_oracle(originals[i], subspace.bases[i], 0.5)
        assert worst_ratio((found.double() - weights[i].double()).abs(), 2 * bound) <= 1
        float32_part = (bound - 1.01 * unit_roundoff(dtype) * exact.abs() - underflow(dtype)).clamp_min(0)
        likely = float((2 * float32_part / ulp(weights[i])).clamp_max(1).mean())
        share = float((found != weights[i]).double().mean())
        allowed = likely + 5 * (likely / found.numel()) ** 0.5
        print(f"{dtype} layer {i}: merged, {share:.5f} of the elements differ, at most {allowed:.5f}")
        assert dtype == torch.float32 or share <= allowed < 0.05


def test_what_is_written_is_verified_and_every_planted_fault_is_named(tmp_path, capsys):
    saved(tmp_path)
    words = ["--model", tmp_path / "source", "--subspace", tmp_path / "subspace.safetensors", "--out"]
    adapter = tmp_path / "adapter"
    assert lora.run([str(w) for w in [*words, adapter, "--no-damage"]]) == 0
    assert "2 layers, rank 5 padded to 8, strength 1" in capsys.readouterr().out
    assert sorted(p.name for p in adapter.rglob("*") if p.is_file()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "subspace.safetensors")
    ]
    right = load_file(adapter / WEIGHTS)
    assert sorted(right) == sorted([A.format(i) for i in LAYERS] + [B.format(i) for i in LAYERS])
    assert all(t.dtype == torch.float32 for t in right.values())
    for extra in ([], ["--model", tmp_path / "source"], ["--subspace", tmp_path / "subspace.safetensors"]):
        assert verify.run([str(w) for w in ["--adapter", adapter, *extra]]) == 0
    assert "leak if rounded to bfloat16" in capsys.readouterr().out

    def faults(change, model=True):
        tensors = {name: t.clone() for name, t in right.items()}
        change(tensors)
        save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
        record = json.loads((adapter / "provenance.json").read_text())
        record["sha256"][WEIGHTS] = sha256(adapter / WEIGHTS)
        (adapter / "provenance.json").write_text(json.dumps(record))
        found = verify_adapter(adapter, tmp_path / "source" if model else None)["faults"]
        return "\n".join(found)

    a, b = A.format(2), B.format(2)
    assert faults(lambda t: None) == ""
    assert "layer 2: model.layers.2.mlp.down_proj: the error of A is" in faults(lambda t: t.update({a: t[a] * 0.99}))
    assert "error of A is" in faults(lambda t: t[a][1, 7].mul_(-1))
    assert "error of A is" in faults(lambda t: t[a].copy_(t[A.format(1)]))
    off = "layer 2: model.layers.2.mlp.down_proj: B is not the negative basis"
    assert faults(lambda t: t[b][3, 2].add_(1e-6), model=False) == off
    assert "the padding of the rank is not zero" in faults(lambda t: t[a][6, 0].add_(1), model=False)
    assert "A holds NaN" in faults(lambda t: t[a][0, 0].fill_(torch.nan), model=False)
    assert "A or B is missing" in faults(lambda t: t.pop(a))
    assert "does not belong to a layer" in faults(lambda t: t.update({A.format(3): t[a].clone()}))
    assert "another model" not in faults(lambda t: t.update({a: t[a] * 0.99}))
    both = faults(lambda t: t.update({A.format(i): 2 * t[A.format(i)] for i in LAYERS}))
    assert both.startswith("A of 2 of 2 matrices is wrong: is it another model?\n")
    assert faults(lambda t: None) == ""
    # Every field that changes what PEFT computes, also those that are not there.
    config = json.loads((adapter / CONFIG).read_text())
    wrong = {
        **{"lora_alpha": 16, "layers_to_transform": [1], "target_modules": ["up_proj"], "layers_pattern": "blocks"},
        **{"alpha_pattern": {"down_proj": 32}, "init_lora_weights": "pissa", "use_rslora": True, "peft_type": "LOHA"},
        **{"exclude_modules": ["down_proj"], "rank_pattern": {"down_proj": 4}, "base_model_name_or_path": "a/b"},
    }
    for key, value in wrong.items():
        (adapter / CONFIG).write_text(json.dumps(config | {key: value}))
        found = verify_adapter(adapter)["faults"]
        assert f"adapter_config.json: {key} is {value!r}, not {config.get(key)!r}" in found
        assert any("SHA-256 differs" in f for f in found)
    for broken in ("{", "3"):
        (adapter / CONFIG).write_text(broken)
        with pytest.raises(ValueError, match="is not an adapter configuration"):
            verify_adapter(adapter)


def test_an_adapter_vouches_for_nothing_by_itself(tmp_path, capsys):
    """Without the original A is not compared, and that is said; bases that are none are refused."""
    _, subspace = saved(tmp_path)
    write_adapter(tmp_path / "source", subspace, tmp_path / "adapter")
    assert verify.run(["--adapter", str(tmp_path / "adapter")]) == 0
    said = capsys.readouterr().out
    assert "A was not checked against the weights: give --model to check it" in said
    assert "what can be checked without the original holds" in said
    assert "everything holds" not in said and "next: python -m kernel_surgery.verify --adapter" in said
    out = ["--out", str(tmp_path / "certificate.json")]
    assert verify.run(["--adapter", str(tmp_path / "adapter"), *out]) == 0
    page = (tmp_path / "certificate.html").read_text(encoding="utf-8")
    assert "What can be checked without the original holds." in page and "<h2>By layer</h2>" not in page
    assert "made exactly" not in page
    capsys.readouterr()
    assert verify.run(["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "source")]) == 0
    assert "everything holds" in capsys.readouterr().out
    kept = tmp_path / "adapter" / "kernel_surgery" / "subspace.safetensors"
    save_file({f"basis.{i}": torch.zeros(48, 5) for i in LAYERS}, kept)
    with pytest.raises(ValueError, match="layer 1 is not orthonormal"):
        verify_adapter(tmp_path / "adapter")
    save_file({"basis.1": subspace.bases[1]}, kept)
    with pytest.raises(ValueError, match=r"bases of layers \[1\], rank 5, but provenance.json says layers \[1, 2\]"):
        verify_adapter(tmp_path / "adapter")
    kept.unlink()
    with pytest.raises(FileNotFoundError, match=r"subspace\.safetensors"):
        verify_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"was made at strength 1, not 0\.5"):
        verify.run(["--adapter", str(tmp_path / "adapter"), "--strength", "0.5"])


def test_what_cannot_be_an_adapter_is_refused_and_nothing_is_left(tmp_path):
    model, subspace = saved(tmp_path)
    with_bias = pico("llama", bias=True)
    message = r"layers\.1\.mlp\.down_proj has a bias, which an adapter cannot"
    with pytest.raises(ValueError, match=message), adapted(with_bias, dict(subspace.bases)):
        pytest.fail("the block was entered")
    # A bias of zero is none.
    for site in mlp_outputs(with_bias).values():
        site.module.bias.data.zero_()
    with adapted(with_bias, dict(subspace.bases)) as edit:
        logits(with_bias)
    assert edit.calls == {1: 1, 2: 1}

    def refused(message, source="source", space=subspace, error=ValueError):
        with pytest.raises(error, match=message):
            write_adapter(tmp_path / source, space, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))

    biased = pico("llama", mlp_bias=True)
    biased.model.layers[2].mlp.down_proj.bias.data.normal_()
    biased.save_pretrained(tmp_path / "biased")
    refused(
        r"model\.layers\.2\.mlp\.down_proj has a bias",
        "biased",
        Subspace(dict(subspace.bases), fingerprint=fingerprint(biased)),
    )
    refused("measured on other weights", "biased")
    bake_checkpoint(tmp_path / "source", subspace, tmp_path / "baked")
    refused("was baked before", "baked")
    model.model.layers[2].mlp.down_proj.weight.data[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    refused(r"layers\.2\.mlp\.down_proj\.weight holds NaN or Inf", "broken")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match=r"already exists\. Choose another --out"):
        write_adapter(tmp_path / "source", subspace, tmp_path / "taken")
    with pytest.raises(UserError, match="finite"):
        lora.run(["--model", "polyglot", "--subspace", "x", "--out", "y", "--strength", "nan"])


def test_the_adapter_is_of_a_given_strength(tmp_path):
    model, subspace = saved(tmp_path, torch.float32)
    for strength in (2.0, -0.5):
        out = tmp_path / str(strength)
        write_adapter(tmp_path / "source", subspace, out, strength=strength)
        a = load_file(out / WEIGHTS)[A.format(1)]
        weight = model.model.layers[1].mlp.down_proj.weight.detach()
        exact = strength * subspace.bases[1].double().T @ weight.double()
        assert worst_ratio((a[:5].double() - exact).abs(), adapter_bound(weight, strength)) <= 1
        assert verify_adapter(out, tmp_path / "source")["faults"] == []
