"""Where the edit goes: every known architecture, every requested layer, and clear refusals of everything else."""

import json
import re

import pytest
import torch

from kernel_surgery.edit.plan import on_states
from kernel_surgery.models.architectures import (
    decoder_layers,
    default_layers,
    layout_named,
    mlp_outputs,
    parse_layers,
    residual_outputs,
    submodule,
)
from kernel_surgery.models.load import read_config
from kernel_surgery.models.stored import layout_in
from kernel_surgery.models.table import ARCHITECTURES, REFUSED
from tests.support.models import pico
from tests.support.picos import EXPERTS, LAYERS, D, pico_of


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_known_architecture_has_a_site_a_layer(kind):
    model, layout = pico_of(kind), ARCHITECTURES[kind]
    sites, modules, blocks = mlp_outputs(model), dict(model.named_modules()), decoder_layers(model)
    assert list(sites) == list(range(LAYERS)) and len(blocks) == LAYERS
    for layer, site in sites.items():
        assert site.layer == layer and modules[site.name] is site.module is submodule(blocks[layer], layout.site)
        assert site.d_model == D and all(part.shape[0] == D for w in site.weights for _, part in w.parts())
        matrices = [name for w in site.weights if w.matrix for name, _ in w.parts()]
        assert len(matrices) == len(set(matrices)) and (len(matrices) == 1 or len(matrices) in (EXPERTS, EXPERTS + 1))
    assert [modules[site.name] for site in residual_outputs(model, [1, 3]).values()] == [blocks[i] for i in (1, 3)]


def states(output):
    """A copy: a Falcon layer adds to the MLP block's output in place."""
    return (output[0] if isinstance(output, tuple) else output).clone()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nothing_else_writes_into_the_output(kind):
    """With every tensor of the site at zero, the MLP block's output is zero: none was forgotten."""
    model, seen = pico_of(kind), {}
    for site in mlp_outputs(model).values():
        for weight in site.weights:
            weight.tensor.data.zero_()
        site.module.register_forward_hook(lambda m, args, out, layer=site.layer: seen.update({layer: states(out)}))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    assert len(seen) == LAYERS and not any(out.any() for out in seen.values())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_follows_is_what_the_table_says(kind):
    """The layer's output is x + f(y), where f is the identity, a multiple, or a norm, and x does not depend on y."""
    model, layout = pico_of(kind), ARCHITECTURES[kind]
    config, site = model.config.get_text_config(), mlp_outputs(model, [2])[2]
    block, seen, change = decoder_layers(model)[2], [], torch.zeros(D)
    hook = on_states(lambda module, inputs, output: output + change)
    site.module.register_forward_hook(hook)
    block.register_forward_hook(lambda m, args, out: seen.append(states(out)))
    changes = [torch.zeros(D), 100 * torch.randn(D, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        for change in (*changes, 2 * changes[1]):  # noqa: B007 - the hook reads it
            model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    once, twice = seen[1] - seen[0], seen[2] - seen[0]
    scale = getattr(config, layout.scaled) if layout.scaled else 1.0
    if layout.follows == "norm":
        assert layout.after is not None and submodule(block, layout.after) is not None
        assert (twice - 2 * once).norm() > 0.1 * twice.norm()  # not linear
    else:
        # Sums of a few float32 numbers of the size of the residual stream.
        room = 8 * torch.finfo(torch.float32).eps * (seen[0].abs() + 2 * changes[1].abs())
        assert ((once - scale * changes[1]).abs() <= room).all() and ((twice - 2 * once).abs() <= 2 * room).all()


SWITCHED = {"stablelm": "use_parallel_residual", "gpt_neox": "use_parallel_residual", "falcon": "parallel_attn"}


@pytest.mark.parametrize(
    "kind, switch",
    [*((kind, None) for kind in ARCHITECTURES), *((kind, on) for kind in SWITCHED for on in (True, False))],
)
def test_in_parallel_means_that_the_mlp_does_not_read_what_attention_gives(kind, switch):
    """Attention's output is changed: what the MLP block reads changes too, unless the two are parallel."""
    layout = ARCHITECTURES[kind]
    model = pico_of(kind, **({} if switch is None else {SWITCHED[kind]: switch}))
    config, block, seen = model.config.get_text_config(), decoder_layers(model)[3], []
    parallel = layout.follows == "parallel" and (not layout.parallel_if or getattr(config, layout.parallel_if))
    mixers = [m for name, m in block.named_children() if name in ("self_attn", "attention", "self_attention", "attn")]
    change = 0.0

    def changed(module, inputs, output):
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    if not mixers:  # a layer without attention, such as of a short convolution
        mixers = [m for name, m in block.named_children() if name in ("conv", "linear_attn")]
    (mixer,) = mixers
    mixer.register_forward_hook(changed)
    read = submodule(block, layout.site.partition(".")[0])
    read.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
        change = 1.0
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    assert torch.equal(seen[0], seen[1]) == parallel
    assert (layout.parallel_if is not None) == (kind in SWITCHED)


def test_a_switch_with_which_the_site_is_not_called_is_refused():
    model = pico_of("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(ValueError, match=r"slow_but_exact = true.*transformer\.h\.\*\.mlp.*would not be made"):
        mlp_outputs(model)


def test_a_language_model_of_another_type_inside_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'mistral3' model with a 'mistral4' model inside is not known: only mistral"):
        layout_named("mistral3", "mistral4")
    config = {"model_type": "mistral3", "text_config": {"model_type": "mistral4", "hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="a 'mistral4' model inside"):
        layout_in(tmp_path)
    assert layout_named("mistral3", "ministral3") is layout_named("mistral3")


def test_older_names_of_fields_are_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_embed": 8, "n_layer": 2, "max_seq_len": 64}')
    config = read_config(tmp_path)
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (8, 2, 64)
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_layer": 2}')
    with pytest.raises(ValueError, match=r"'hidden_size' is missing\)\.\nFetch it again, or add the field"):
        read_config(tmp_path)


def test_an_unknown_architecture_is_refused_by_name():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8, vocab_size=16))
    with pytest.raises(ValueError, match=r"'opt' model: it is none of the \d+ known model types"):
        mlp_outputs(model)
    with pytest.raises(ValueError, match="'Linear' model"):
        decoder_layers(torch.nn.Linear(2, 2))
    for kind, why in REFUSED.items():
        with pytest.raises(ValueError, match=f"'{kind}' models are not supported: {re.escape(why)}"):
            layout_named(kind)


def test_missing_weights_are_refused_and_quantised_ones_named():
    model = pico("qwen2")
    model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj is a Identity, without a weight that writes"):
        mlp_outputs(model)
    assert list(mlp_outputs(model, [0, 2])) == [0, 2]
    model = pico("qwen2")
    down = model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    assert mlp_outputs(model)[0].quantised == "model.layers.0.mlp.down_proj.weight"
    assert mlp_outputs(model)[1].quantised is None
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
