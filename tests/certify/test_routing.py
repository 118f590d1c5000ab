"""What a router decides is found, given to another run of the model, and counted where that would decide otherwise."""

from contextlib import ExitStack

import pytest
import torch

from kernel_surgery.certify.routing import Replay, differing, on_cpu, router_of, routing_given, routing_seen
from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.table import ARCHITECTURES
from tests.support.marks import everyday
from tests.support.picos import EXPERTS, pico_of

KINDS = [kind for kind, row in ARCHITECTURES.items() if any(form.stacked for form in row.writes)]
IDS = torch.randint(1, 64, (3, 8), generator=torch.Generator().manual_seed(0))


def recorded(model):
    """{layer: what the router returned} for IDS, and the logits."""
    sites, kept = mlp_outputs(model), {}
    with ExitStack() as stack, torch.no_grad():
        seen = {i: stack.enter_context(routing_seen(router_of(site))) for i, site in sites.items()}
        logits = model(input_ids=IDS, use_cache=False).logits
    for layer, outputs in seen.items():
        assert (router_of(sites[layer]) is None) == (not any(weight.form.stacked for weight in sites[layer].weights))
        assert len(outputs) == (router_of(sites[layer]) is not None)
        if outputs:
            kept[layer] = on_cpu(outputs[0])
    return sites, kept, logits


@pytest.mark.parametrize("kind", everyday(KINDS, "mixtral", "deepseek_v3", "gpt_oss", "llama4"))
def test_every_mixture_has_one_router_whose_output_can_be_given_again(kind):
    model = pico_of(kind)
    sites, kept, logits = recorded(model)
    assert kept
    with torch.no_grad():
        # The same routing, a part of the text at a time, is the same run.
        cache, parts, flips = None, [], 0
        replay = Replay(sites, kept, len(IDS))
        for start, stop in ((0, 5), (5, 6), (6, 8)):
            with ExitStack() as stack:
                counts = replay.step(stack, start, stop)
                out = model(input_ids=IDS[:, start:stop], past_key_values=cache, use_cache=True)
            assert all(len(count) == 1 for count in counts)
            cache, flips = out.past_key_values, flips + sum(map(sum, counts))
            parts.append(out.logits)
        error = float((torch.cat(parts, 1) - logits).norm() / logits.norm())
        assert flips == 0 and error < 1e-4
        # Another one is not: every token of the last mixture goes to other experts.
        layer, given = max(kept.items())
        turned = tuple(turn(tensor) for tensor in given)
        with routing_given(router_of(sites[layer]), turned) as counted:
            other = model(input_ids=IDS, use_cache=False).logits
        assert counted == [differing(turned, given)] and counted[0] > IDS.numel() / 2
        assert float((other - logits).norm() / logits.norm()) > 100 * error + 1e-3


def turn(tensor):
    """A router's output with each expert's place taken by the next one."""
    if not tensor.is_floating_point():
        return (tensor + 1) % EXPERTS
    return tensor.roll(1, -1) if tensor.shape[-1] == EXPERTS else tensor


def test_a_block_with_two_routers_is_refused():
    site = mlp_outputs(pico_of("mixtral"), [1])[1]
    site.module.other = torch.nn.Linear(48, EXPERTS, bias=False)
    with pytest.raises(ModelError, match=r"router of model.layers.1.mlp: 2 of its parts have a matrix \[4, 48\]"):
        router_of(site)
