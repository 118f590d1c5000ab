"""Where the edit goes: every known architecture, every requested layer, and clear refusals of everything else."""

import pytest
import torch

from kernel_surgery.models.architectures import (
    ARCHITECTURES,
    decoder_layers,
    default_layers,
    mlp_outputs,
    parse_layers,
    residual_outputs,
)
from tests.support.models import pico


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_known_architecture_has_a_site_a_layer(kind):
    model = pico(kind)
    sites = mlp_outputs(model)
    assert list(sites) == [0, 1, 2, 3]
    modules = dict(model.named_modules())
    for layer, site in sites.items():
        assert site.layer == layer and modules[site.name] is site.module is model.model.layers[layer].mlp.down_proj
    assert [modules[site.name] for site in residual_outputs(model, [1, 3]).values()] == [
        model.model.layers[i] for i in (1, 3)
    ]
    assert len(decoder_layers(model)) == 4


def test_the_site_is_added_to_the_residual_stream_as_it_is():
    """What makes an edit of down_proj an edit of what the layer writes; a norm after the MLP would break it."""
    for kind in ARCHITECTURES:
        model, seen = pico(kind), {}
        layer = model.model.layers[2]
        layer.mlp.register_forward_hook(lambda m, args, out, seen=seen: seen.update(mlp=out))
        layer.register_forward_hook(lambda m, args, out, seen=seen: seen.update(out=out))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(before=args[0]))
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]))
        out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
        torch.testing.assert_close(out, seen["before"] + seen["mlp"], rtol=0, atol=0)


def test_an_unknown_architecture_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(ValueError, match=r"'gpt2' model: known .*qwen2.*\nTo support it, add its layout"):
        mlp_outputs(model)
    with pytest.raises(ValueError, match="'Linear' model"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_missing_and_quantised_weights_are_refused():
    model = pico("qwen2")
    model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is a Identity.*\n.*without quantisation"):
        mlp_outputs(model)
    assert list(mlp_outputs(model, [0, 2])) == [0, 2]
    model = pico("qwen2")
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="not a floating-point"):
        mlp_outputs(model)
    del model.model.layers[3].mlp
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj does not exist"):
        mlp_outputs(model, [3])


@pytest.mark.parametrize("n, first, last", [(36, 9, 26), (28, 7, 20), (8, 2, 5), (4, 1, 2), (3, 1, 1)])
def test_the_default_layers_are_the_middle_half(n, first, last):
    assert list(default_layers(n)) == list(range(first, last + 1))


def test_a_model_without_a_middle_half_needs_named_layers():
    with pytest.raises(ValueError, match="of 2 layers has no middle half"):
        default_layers(2)


def test_layers_are_read_from_text():
    assert parse_layers("9-11", 36) == [9, 10, 11] and parse_layers(" 2, 7 ,3-4", 8) == [2, 3, 4, 7]
    for text in ("", "a", "3-", "-3", "4-2", "1,,2", "1.5"):
        with pytest.raises(ValueError, match="cannot read layers"):
            parse_layers(text, 8)
    with pytest.raises(ValueError, match=r"layer 8 is out of range.*8 layers, 0 to 7"):
        parse_layers("5-8", 8)
    with pytest.raises(ValueError, match="twice"):
        parse_layers("1,1", 8)
    with pytest.raises(ValueError, match="no layers"):
        mlp_outputs(pico("llama"), [])
