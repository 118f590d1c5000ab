"""A few architectures in vLLM, beside transformers; a shared expert that is left out is caught; adapters are loaded.

`python -m tests.engines.architectures` runs all of them.
"""

import json

import pytest
import torch

from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.engines import layers
from kernel_surgery.models.architectures import mlp_outputs
from tests.support.served import LAYERS, compared, pico_files, wrong

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("vllm_environment")]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma3_text", "gpt_neox", "flex_olmo"])
def test_texts_and_log_probabilities_are_those_of_transformers(kind):
    rows = compared(kind)
    print(kind, rows)
    assert wrong(rows) == [] and set(rows) == {"original", "fused"}


def test_an_edit_of_the_routed_experts_alone_is_caught(monkeypatch):
    """The block adds its shared expert to them, and the edit is of the sum."""
    assert wrong(compared("qwen2_moe")) == []

    def routed_only(base):
        class Planted(base):
            def forward(self, hidden_states):
                whole = super().forward(hidden_states)
                experts = getattr(self, "experts", None)
                shared = 0.0 if experts is None else self.shared_expert(hidden_states)
                return layers.edited_output(self, whole - shared) + shared

        return Planted

    monkeypatch.setattr(layers, "edited_block", routed_only)
    rows = compared("qwen2_moe")
    faults = wrong(rows)
    print(faults, rows)
    assert faults and faults[0].startswith("fused: log probabilities are off by ")


def test_a_model_that_vllm_has_not_is_refused_by_vllm():
    with pytest.raises(KernelSurgeryError, match=r"vLLM did not start for mode original: .*MptForCausalLM"):
        compared("mpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the kernels")
def test_an_adapter_of_experts_is_refused_without_a_gpu():
    with pytest.raises(KernelSurgeryError, match="CPU engine has no kernels for an adapter of experts"):
        compared("qwen2_moe", ["lora"])


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral"])
def test_vllms_own_loader_gives_every_expert_its_pair(kind, tmp_path):
    """vLLM's CPU engine has no kernels for adapters of experts, so its loader is asked instead."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    block, names = {"qwen2_moe": ("mlp", ("gate_proj", "down_proj", "up_proj"))}.get(
        kind, ("block_sparse_moe", ("w1", "w2", "w3"))
    )
    with pico_files(kind) as (model, folder, subspace):
        write_adapter(folder / "model", subspace, tmp_path / "adapter")
        asked = [f"experts.{expert}.{name}" for expert in range(4) for name in names]  # in the order of vLLM's mapping
        helper = PEFTHelper.from_local_dir(str(tmp_path / "adapter"), None)
        held = LoRAModel.from_local_checkpoint(
            str(tmp_path / "adapter"), {*asked, "experts", "down_proj"}, helper, lora_model_id=1, device="cpu"
        )
        path = f"model.layers.2.{block}"
        packed = PackedLoRALayerWeights.pack_moe([held.loras[f"{path}.{name}"] for name in asked], f"{path}.experts")
        (gate_a, down_a, up_a), (gate_b, down_b, up_b) = packed.lora_a, packed.lora_b
        assert not gate_b.any() and not up_b.any() and not gate_a.any() and not up_a.any()
        (weight,) = (w for w in mlp_outputs(model, LAYERS)[2].weights if w.form.stacked)
        edit = subspace.projections[2]
        for expert, (_, matrix) in enumerate(weight.parts()):
            exact = -subspace.strength_at(2, 1.0) * edit.basis.double() @ (edit.reads.double().T @ matrix.double())
            made = down_b[expert].double() @ down_a[expert].double() * packed.scaling[1]
            assert torch.allclose(made, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
            other = down_b[expert].double() @ down_a[(expert + 1) % 4].double()
            assert float((other - exact).abs().max()) > 0.1 * float(exact.abs().max())
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["target_modules"] == [] and helper.r == 8
