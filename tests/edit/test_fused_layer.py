"""The edit inside the decoder layer: the same bits as operators one after another, on every architecture, compiled too;
whatever it cannot be sure of, it leaves to the operator after down_proj and says so."""

import copy
import weakref

import pytest
import torch

from kernel_surgery import baked, fused, hooked, ops
from kernel_surgery.common.names import REACHES
from kernel_surgery.edit.fused_layer import decoder_layers
from kernel_surgery.models.architectures import next_norm
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from tests.support.models import PLAIN, basis, pico

LAYERS = (1, 2, 3)  # 3 is the last: the norm after it is the model's own
NORM = torch.ops.kernel_surgery.project_add_rmsnorm.default


@pytest.fixture
def bases():
    return {layer: basis(48, 5, seed=layer) for layer in LAYERS}


def ids():
    return torch.arange(1, 13).reshape(2, 6)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=ids(), **more).logits


@pytest.fixture
def operators(monkeypatch):
    """Counts the calls of the three operators."""
    counts = dict.fromkeys(("project", "project_add", "project_add_rmsnorm"), 0)
    for name in counts:
        real = getattr(ops, name)

        def counted(*args, name=name, real=real, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    return counts


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 0.4, 2.0])
def test_every_reach_gives_the_same_bits(kind, dtype, strength, bases):
    model, seen = pico(kind, dtype=dtype, bias=True), {}
    plain = logits(model)
    for reach in REACHES:
        with fused(model, bases, strength, reach=reach) as edit:
            seen[reach] = logits(model)
        assert edit.reach == dict.fromkeys(LAYERS, reach) and edit.fallbacks == {}
        assert edit.calls == dict.fromkeys(LAYERS, 1)
    assert torch.equal(seen["output"], seen["add"]) and torch.equal(seen["output"], seen["norm"])
    assert not torch.equal(seen["norm"], plain) and torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", PLAIN)
def test_at_strength_0_the_model_gives_its_own_bits(kind, bases):
    model = pico(kind, dtype=torch.bfloat16)
    plain = model(input_ids=ids(), output_hidden_states=True)
    with fused(model, bases, 0.0) as edit:
        edited = model(input_ids=ids(), output_hidden_states=True)
        assert torch.equal(logits(model), plain.logits)
    assert set(edit.reach.values()) == {"norm"}
    for one, other in zip(edited.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(one, other)


def test_each_layer_is_one_operator(bases, operators):
    model = pico("qwen2")
    with fused(model, bases):
        logits(model)
    # An operator is called once a layer, and no other beside it: the edit is made once.
    assert operators == {"project": 0, "project_add": 0, "project_add_rmsnorm": len(LAYERS)}
    with fused(model, bases, reach="add"):
        logits(model)
    assert operators["project_add"] == len(LAYERS)
    # Layers 1 and 2 hand over to the next layer's norm, 3 to the model's: none of them computes its own.
    calls = []
    norms = [next_norm(model, layer) for layer in LAYERS]
    own = type(norms[0]).forward
    with fused(model, bases):
        type(norms[0]).forward = lambda self, h: calls.append(self) or own(self, h)
        try:
            logits(model)
        finally:
            type(norms[0]).forward = own
    assert calls and not any(norm is called for norm in norms for called in calls)


def test_one_batch_holds_edited_and_unedited_sequences_and_can_be_switched(bases):
    model = pico("llama")
    plain = logits(model)
    strength = torch.tensor([0.0, 1.0])
    for reach in REACHES:
        with fused(model, bases, reach=reach):
            whole = logits(model)
        with fused(model, bases, strength, reach=reach) as edit:
            assert edit.strength is strength
            mixed = logits(model)
            strength.copy_(torch.tensor([1.0, 0.0]))
            other = logits(model)
            strength.copy_(torch.tensor([0.0, 1.0]))
        assert torch.equal(mixed[0], plain[0]) and torch.equal(mixed[1], whole[1])
        assert torch.equal(other[0], whole[0]) and torch.equal(other[1], plain[1])
    for mode in (hooked, baked):
        with pytest.raises(TypeError, match="use fused"), mode(model, bases, strength):
            pytest.fail("the block was entered")
    for wrong in (torch.ones(2, 2), torch.tensor([1, 0]), torch.ones(2, requires_grad=True)):
        expected = pytest.raises(ValueError, match=r"expected a number, or a floating-point tensor \[batch\]")
        with expected, fused(model, bases, wrong):
            pytest.fail("the block was entered")
    # On another kind of device it would be copied in every layer, and could not be captured.
    with pytest.raises(ValueError, match=r"strength is on meta, .*down_proj is on cpu: .* model is unchanged\. Move"):
        fused(model, bases, torch.ones(2, device="meta")).__enter__()
    with pytest.raises(ValueError, match="reach is 'everything'; expected one of output, add, norm"):
        fused(model, bases, reach="everything").__enter__()


def test_who_hooks_the_mlps_output_sees_it_edited(bases, operators):
    model, seen = pico("qwen3"), {}
    down = model.model.layers[2].mlp.down_proj
    recorder = down.register_forward_hook(lambda m, args, out: seen.update(plain=out))
    logits(model)
    before = seen["plain"]
    recorder.remove()
    with fused(model, {2: bases[2]}, 0.5):
        expected = logits(model)
        for module in (down, model.model.layers[2].mlp):
            handle = module.register_forward_hook(lambda m, args, out: seen.update(edited=out))
            assert torch.equal(logits(model), expected)
            handle.remove()
            error = (seen["edited"].double() - project_oracle(before, bases[2], 0.5)).abs()
            assert worst_ratio(error, rule_a_bound(before, bases[2], 0.5)) <= 1
        # Called by itself, after its layer has run, the MLP is edited too.
        block, x = model.model.layers[2], torch.randn(3, 48)
        logits(model)
        with torch.no_grad():
            alone = block.mlp(x)
    with torch.no_grad():
        error = (alone.double() - project_oracle(block.mlp(x), bases[2], 0.5)).abs()
        assert worst_ratio(error, rule_a_bound(block.mlp(x), bases[2], 0.5)) <= 1
    assert operators == {"project": 3, "project_add": 0, "project_add_rmsnorm": 2}


@pytest.mark.parametrize("where", ["after the layer", "before the next layer", "before the norm"])
@pytest.mark.parametrize("when", ["before the edit", "inside the block"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_who_changes_the_stream_between_layer_and_norm_is_heard(where, when, how, bases, operators):
    """What was handed over is the norm of another tensor by then."""
    model = pico("llama")

    def change(h):
        if how == "replaced":
            return h * 1.5
        h.mul_(1.5)
        return None

    def register():
        if where == "after the layer":
            return model.model.layers[1].register_forward_hook(lambda m, args, out: change(out))
        reader = model.model.layers[2] if where == "before the next layer" else model.model.layers[2].input_layernorm
        return reader.register_forward_pre_hook(lambda m, args: change(args[0]))

    handle = register()
    with fused(model, bases, reach="output"):
        expected = logits(model)
    if when == "inside the block":
        handle.remove()
    with fused(model, bases) as edit:
        if when == "inside the block":
            handle = register()
        # In inference mode tensors have no version counter that could tell.
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids()).logits, expected)
    handle.remove()
    fell_back = {1: "a hook reads the tensor between the layer and the next norm"} if when == "before the edit" else {}
    assert edit.fallbacks == fell_back
    assert operators["project_add"] == 1 and operators["project_add_rmsnorm"] == 2


def _replace_forward(module):
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)


def _derive(module):
    module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})


FALLBACKS = {
    "derived layer": (lambda m: _derive(m.layers[2]), {2: ("output", "MyLlamaDecoderLayer is not the layer")}),
    "derived MLP": (lambda m: _derive(m.layers[2].mlp), {2: ("output", "MyLlamaMLP is not the MLP")}),
    "replaced forward": (lambda m: _replace_forward(m.layers[2]), {2: ("output", "forward is already replaced")}),
    "replaced MLP": (lambda m: _replace_forward(m.layers[2].mlp), {2: ("output", "forward is already replaced")}),
    "derived norm": (lambda m: _derive(m.norm), {3: ("add", "the next norm is a MyLlamaRMSNorm")}),
    "replaced norm": (lambda m: _replace_forward(m.layers[2].input_layernorm), {1: ("add", "next norm's forward")}),
    "norm in float64": (lambda m: m.layers[3].input_layernorm.double(), {2: ("add", "float64 on cpu, the layer")}),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_it_cannot_be_sure_of_it_leaves_alone_and_says_why(name, bases):
    change, expected = FALLBACKS[name]
    model = pico("llama")
    change(model.model)
    attributes = [sorted(vars(m)) for m in model.modules()]
    dtypes = "norm in float64" in name
    with fused(model, bases, reach="output") as edit:
        assert edit.fallbacks == {}
        right = None if dtypes else logits(model)
    with fused(model, bases) as edit:
        assert {layer: edit.reach[layer] for layer in expected} == {layer: far for layer, (far, _) in expected.items()}
        assert edit.fallbacks.keys() == expected.keys()
        for layer, (_, reason) in expected.items():
            assert reason in edit.fallbacks[layer]
        assert sum(far == "norm" for far in edit.reach.values()) == len(LAYERS) - len(expected)
        if not dtypes:
            assert torch.equal(logits(model), right)
    assert [sorted(vars(m)) for m in model.modules()] == attributes


def test_float64_takes_the_operator_alone(bases):
    model = pico("llama", dtype=torch.float64)
    with fused(model, bases, reach="output"):
        right = logits(model)
    with fused(model, bases) as edit:
        assert torch.equal(logits(model), right)
    assert edit.reach == dict.fromkeys(LAYERS, "output")
    assert set(edit.fallbacks.values()) == {"torch.float64 has no fused addition"}


def test_autocast_and_checkpointing_give_what_the_operator_alone_gives(bases):
    model = pico("llama")
    seen = []
    for reach in REACHES:
        with fused(model, bases, reach=reach), torch.autocast("cpu", torch.bfloat16):
            seen.append(logits(model))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    gradients = {}
    model.train()
    for checkpointed in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if checkpointed:
            model.gradient_checkpointing_enable(checkpointed)
        for reach in REACHES:
            model.zero_grad()
            with fused(model, bases, reach=reach) as edit:
                model(input_ids=ids(), use_cache=False).logits.square().sum().backward()
            # Run again in the backward pass, which is what it is for.
            assert edit.calls == dict.fromkeys(LAYERS, 2 if checkpointed else 1)
            gradients[str(checkpointed), reach] = [p.grad.clone() for p in model.parameters()]
    exact = pico("llama", dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    with fused(exact, bases):
        exact(input_ids=ids(), use_cache=False).logits.square().sum().backward()
    exact = [p.grad for p in exact.parameters()]
    right = gradients["None", "output"]
    # The yardstick is what separate operations miss themselves, and float32 parts that a float64 model keeps (2^-22).
    own = [(one.double() - e).norm() + 2.0**-22 * e.norm() for one, e in zip(right, exact, strict=True)]
    for name, seen in gradients.items():
        ratio = max(float((g.double() - e).norm() / m) for g, e, m in zip(seen, exact, own, strict=True))
        print(f"gradients, {name}: {ratio:.2f} of the separate operations' own error")
        assert ratio <= 2
    # Teeth: without the edit the gradients are others altogether.
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model(input_ids=ids(), use_cache=False).logits.square().sum().backward()
    assert float((model.model.layers[0].mlp.up_proj.weight.grad - right[5]).norm()) > 0.01 * float(right[5].norm())


def test_what_is_handed_over_is_good_for_that_tensor_alone_and_is_not_kept(bases):
    model, x, places = pico("llama"), torch.randn(2, 6, 48), torch.arange(6)[None]
    block, norm = model.model.layers[1], model.model.layers[2].input_layernorm
    own, turned = type(norm).forward, model.model.rotary_emb(x, places)
    with fused(model, bases) as edit, torch.no_grad():
        assert edit.reach[1] == "norm"
        for change in (0, 1):
            h = block(x, None, places, position_embeddings=turned)
            assert torch.equal(norm(h + change), own(norm, h + change))
        h = block(x, None, places, position_embeddings=turned)
        alive = weakref.ref(h), weakref.ref(norm(h))
        del h
        assert [tensor() for tensor in alive] == [None, None]


def test_it_works_with_every_kind_of_cache_and_of_call(bases):
    from transformers import StaticCache

    model, results, h = pico("qwen2"), [], torch.randn(2, 6, 48)
    for reach in ("output", "norm"):
        with fused(model, bases, reach=reach), torch.no_grad():
            seen = [logits(model), logits(model, use_cache=False)]
            for cache in (None, StaticCache(config=model.config, max_cache_len=16)):
                first = model(input_ids=ids()[:, :4], past_key_values=cache, use_cache=True)
                rest = model(input_ids=ids()[:, 4:], past_key_values=first.past_key_values, use_cache=True)
                seen.append(torch.cat([first.logits, rest.logits], 1))
            seen.append(model.generate(ids(), max_new_tokens=5, do_sample=False))
            # A layer called by itself, with what it needs by position.
            places = torch.arange(6)[None]
            turned = model.model.rotary_emb(h, places)
            mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
            seen.append(model.model.layers[1](h, mask, places, position_embeddings=turned))
            seen.append(model.model.layers[1](h, position_embeddings=turned))  # attention wants a mask, if only None
            assert not torch.equal(seen[-2], model.model.layers[1](h, mask * 0, places, position_embeddings=turned))
        results.append(seen)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])  # biases in attention, and norms within it
def test_it_compiles_into_one_graph_with_a_static_cache_and_goes_when_the_edit_goes(kind):
    """Two layers: a layer before another, and the last. What is traced takes as long as there are layers."""
    from transformers import StaticCache

    model, graphs = pico(kind, num_hidden_layers=2), []
    bases = {layer: basis(48, 5, seed=layer) for layer in (0, 1)}
    blocks = decoder_layers(model)

    def backend(graph, _):
        graphs.append(sum(node.target is NORM for node in graph.graph.nodes))
        return graph.forward

    def step(x, places, cache):
        return model(input_ids=x, cache_position=places, past_key_values=cache, use_cache=True).logits

    def run(function):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            prompt = function(ids(), torch.arange(6), cache)
            return [prompt] + [function(ids()[:, :1], torch.tensor([6 + i]), cache) for i in range(2)]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    plain, before = run(compiled), len(graphs)
    assert graphs == [0] * before
    with fused(model, bases) as edit:
        edited = run(compiled)
        counts = graphs[before:]
        assert set(edit.reach.values()) == {"norm"}
    with fused(model, bases, reach="output"):
        apart = run(compiled)
    # Prompt and step are two graphs at most (sizes), each whole (fullgraph), each with every layer's operator.
    assert counts and set(counts) == {len(bases)} and len(counts) <= 3
    after = run(compiled)
    for one, other, first, last in zip(edited, apart, plain, after, strict=True):
        assert torch.equal(one, other) and torch.equal(first, last) and not torch.equal(one, first)
    assert not any(graphs[before + len(counts) :])
    assert not any("forward" in vars(module) for module in (*blocks, *blocks.modules(), model.model.norm))
    torch._dynamo.reset()


def test_a_copy_of_an_edited_model_is_edited_and_its_own(bases):
    """deepcopy copies the replaced forwards: they must not go on computing with the original's weights."""
    model = pico("llama")
    with fused(model, bases, 0.5, reach="output"):
        right = logits(model)
    with fused(model, bases, 0.5):
        twin = copy.deepcopy(model)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(logits(twin), right)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernel is run")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", PLAIN)
def test_on_a_gpu_every_reach_stays_within_rounding_of_the_operator_alone(kind, bases):
    model = pico(kind, dtype=torch.bfloat16).cuda()
    seen = {}
    with torch.no_grad():
        exact = pico(kind, dtype=torch.float32).cuda()
        exact.load_state_dict(model.state_dict())
        with hooked(exact, bases):
            right = exact(input_ids=ids().cuda()).logits.double()
        for reach in REACHES:
            with fused(model, bases, reach=reach) as edit:
                assert edit.provider == "triton/cuda" and edit.fallbacks == {}
                seen[reach] = model(input_ids=ids().cuda()).logits.double()
        plain = float((model(input_ids=ids().cuda()).logits.double() - exact(input_ids=ids().cuda()).logits).norm())
    # The residual addition is bit for bit the separate one (12 rows: one form for all); only the norm's root may differ
    # in its last float32 bit.
    assert torch.equal(seen["output"], seen["add"])
    for reach, logits_of in seen.items():
        error = float((logits_of - right).norm())
        print(f"{kind} {reach}: error {error:.3g}, the original's own in bfloat16 {plain:.3g}")
        assert error <= 2 * plain


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_on_a_gpu_a_step_with_a_static_cache_compiles_and_is_captured(how, bases):
    model = pico("qwen2", dtype=torch.bfloat16).cuda()
    strength = torch.tensor([0.0, 1.0], device="cuda")
    x, places = ids()[:, :1].cuda(), torch.tensor([6], device="cuda")

    def step_of(model, cache):
        return model(input_ids=x, cache_position=places, past_key_values=cache, use_cache=True).logits

    def step(cache):
        return step_of(model, cache)

    with torch.no_grad(), fused(model, bases, strength) as edit:
        assert set(edit.reach.values()) == {"norm"}
        cache, rewind = filled_cache(model, "cuda")
        eager = step(cache)
        rewind()
        if how == "compiled":
            # Compiled code rounds elsewhere: it may miss the float32 model by twice what eager bfloat16 misses it by.
            wide = pico("qwen2").cuda()
            wide.load_state_dict(model.state_dict())
            with fused(wide, bases, strength):
                exact = step_of(wide, filled_cache(wide, "cuda")[0])
            error, own = (float((y - exact).norm()) for y in (torch.compile(step, fullgraph=True)(cache), eager))
            print(f"compiled: error {error:.3g}, eager {own:.3g}")
            assert error <= 2 * own
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(cache)
        rewind()
        graph.replay()
        assert torch.equal(captured, eager)
        # One graph serves edited and unedited requests: the strengths are read at every replay.
        strength.copy_(torch.tensor([1.0, 0.0]))
        rewind()
        graph.replay()
        assert not torch.equal(captured, eager)
        rewind()
        assert torch.equal(captured, step(cache))


def filled_cache(model, device):
    """(a static cache that holds the prompt, a function that brings it back to that state in place)."""
    from transformers import StaticCache

    cache, first = StaticCache(config=model.config, max_cache_len=16), torch.arange(6, device=device)
    model(input_ids=ids().to(device), cache_position=first, past_key_values=cache, use_cache=True)
    held = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    state = [t.clone() for t in held]

    def rewind():
        for tensor, value in zip(held, state, strict=True):
            tensor.copy_(value)

    return cache, rewind


def test_a_static_cache_can_be_brought_back(bases):
    """What the GPU tests rely on: a cache moves on by itself, so a second step is another one."""
    model = pico("qwen2")
    with torch.no_grad(), fused(model, bases):
        cache, rewind = filled_cache(model, "cpu")
        more = {"cache_position": torch.tensor([6]), "past_key_values": cache, "use_cache": True}
        steps = [model(input_ids=ids()[:, :1], **more).logits for _ in range(2)]
        rewind()
        assert torch.equal(model(input_ids=ids()[:, :1], **more).logits, steps[0])


@pytest.mark.parametrize("fault", [MemoryError, KeyboardInterrupt])
def test_an_mlp_that_fails_leaves_the_edit_on(fault, bases, monkeypatch):
    model, x = pico("llama"), torch.randn(3, 48)
    with fused(model, bases, 0.5), torch.no_grad():
        right, alone = logits(model), model.model.layers[2].mlp(x)

        def failing(*args):
            raise fault

        with monkeypatch.context() as patched, pytest.raises(fault):
            patched.setattr(model.model.layers[2].mlp.act_fn, "forward", failing)
            logits(model)
        assert torch.equal(model.model.layers[2].mlp(x), alone)
        assert torch.equal(logits(copy.deepcopy(model)), right) and torch.equal(logits(model), right)


def test_hooks_on_every_module_are_heard_too(bases, operators):
    from torch.nn.modules.module import register_module_forward_hook

    model, seen = pico("llama"), []
    mlp = model.model.layers[2].mlp
    with fused(model, bases, reach="output"):
        right = mlp.register_forward_hook(lambda m, args, out: seen.append(out))
        expected = logits(model)
        right.remove()
    with fused(model, bases):
        handle = register_module_forward_hook(lambda m, args, out: seen.append(out) if m is mlp else None)
        try:
            assert torch.equal(logits(model), expected)
        finally:
            handle.remove()
    assert len(seen) == 2 and torch.equal(*seen) and operators["project_add_rmsnorm"] == 0
