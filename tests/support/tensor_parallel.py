"""Measured by two processes: python -m tests.support.tensor_parallel FOLDER OUT RECIPE

tests/edit/test_tensor_parallel.py says what must hold. FOLDER holds models. Every process loads each of them twice,
whole and split, and measures the split one. Process 0 writes the figures to OUT. At the end RECIPE runs, the script of
docs/scale.md. One start answers everything, because it takes as long as all the measurements.
"""

import contextlib
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kernel_surgery import POLYGLOT_SUBSPACE, Subspace, adapted, baked, fused, hooked
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.damage.yardsticks import in_other_precision, rounded_weights
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.lora import add_pair, lora_pair
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.shards import local, part_of, whole
from kernel_surgery.numerics.bounds import applied_bound, baked_element_bound, split_bound, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle, exact_output
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import oblique

MODES = {"hook": hooked, "fused": fused, "baked": baked, "lora": adapted}
STRENGTH = 0.9


def load(folder, dtype, split):
    more = {"distributed_config": DistributedConfig(tp_plan="auto")} if split else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()


def edits_of(folder, model):
    """The embedded model's own subspace; for others an oblique edit, with an offset where a bias can hold it."""
    if folder.name.startswith("polyglot"):
        return Subspace.load(POLYGLOT_SUBSPACE)
    d, offset = model.config.hidden_size, "bias" in folder.name
    return {layer: oblique(d, 5, seed=layer, offset=offset, spread=4.0) for layer in (1, 2)}


def modes_of(folder):
    return [mode for mode in MODES if mode != "lora" or "bias" not in folder.name]


def logits(model, ids, grad=False):
    with torch.set_grad_enabled(grad):
        return model(input_ids=ids).logits


def inputs_of(model, layers, ids):
    """{layer: what the whole model's `down_proj` reads, [rows, d_ff]}."""
    found, handles = {}, []
    for layer, site in mlp_outputs(model, layers).items():

        def keep(module, inputs, output, layer=layer):
            found[layer] = inputs[0].detach().flatten(0, 1)

        handles.append(site.module.register_forward_hook(keep))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


def everywhere(value, worst=max):
    """The worst of every process's value."""
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return worst(held)


def same_bits(tensor):
    held = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(held, tensor.contiguous())
    return all(torch.equal(held[0], other) for other in held)


def in_bound(mode, module, h, edit, output):
    """Error / bound of one split layer's output for the whole input h, against the exact edit of it."""
    weight, bias = whole(module.weight).detach(), module.bias
    bias = None if bias is None else local(bias).detach()
    exact = exact_output(weight, h, edit, STRENGTH, bias)
    used = bake_oracle(weight, edit, STRENGTH) if mode == "baked" else weight.double()
    columns = local(module.weight).shape[1]
    ends = [0, weight.shape[1] - columns if dist.get_rank() else columns, weight.shape[1]]
    pieces = [h[:, a:b].double() @ used[:, a:b].T for a, b in itertools.pairwise(ends)]
    bound = applied_bound(mode, exact, edit, h.shape[1], h.dtype, STRENGTH)
    bound = bound + split_bound(mode, torch.stack(pieces), edit, h.dtype, STRENGTH, bias is not None)
    return worst_ratio((output.double() - exact.y).abs(), bound)


def by_layer(one, split, edits, modes):
    """{mode: error / bound}, the worst of the layers and processes."""
    ids = torch.randint(1, one.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(7))
    found = inputs_of(one, list(edits), ids)
    ratios = dict.fromkeys(modes, 0.0)
    for mode in modes:
        before = {layer: site.module.weight for layer, site in mlp_outputs(split, edits).items()}
        values = {layer: whole(weight).detach().clone() for layer, weight in before.items()}
        outputs = {}
        with MODES[mode](split, edits, STRENGTH), torch.no_grad():
            for layer, site in mlp_outputs(split, edits).items():
                outputs[layer] = site.module(part_of(found[layer], site.module.weight))
        for layer, site in mlp_outputs(split, edits).items():
            assert site.module.weight is before[layer] and torch.equal(whole(site.module.weight), values[layer])
            ratios[mode] = max(ratios[mode], in_bound(mode, site.module, found[layer], edits[layer], outputs[layer]))
    return {mode: everywhere(ratio) for mode, ratio in ratios.items()}


def faults(one, split, edits):
    """{fault: error / bound} of one layer with a mistake in it: each must break its bound."""
    ids = torch.randint(1, one.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(7))
    layer = next(iter(edits))
    edit, module = Projection.of(edits[layer]), mlp_outputs(split, [layer])[layer].module
    h, bias = inputs_of(one, [layer], ids)[layer], module.bias
    mine, weight = part_of(h, module.weight), local(module.weight).detach()

    def reduced(partial):
        dist.all_reduce(partial)
        return partial if bias is None else partial + local(bias).detach()

    def ratio(mode, output):
        return everywhere(in_bound(mode, module, h, edit, output))

    with torch.no_grad():
        plain = module(mine)
        half = weight if dist.get_rank() else bake_weight(weight, edit, STRENGTH)
        made = {
            "edit skipped on process 1": ("hook", plain if dist.get_rank() else project_eager(plain, edit, STRENGTH)),
            "baked on process 0 alone": ("baked", reduced(mine @ half.T)),
        }
        if edit.offset is not None:
            early = reduced(project_eager(mine @ weight.T, edit, STRENGTH))
            made["edit before the reduction, with an offset"] = ("hook", early)
        else:
            pair = lora_pair(weight, edit, STRENGTH)
            made["adapter's product not summed"] = ("lora", add_pair(plain, pair.a, pair.b, mine))
    return {name: ratio(*pair) for name, pair in made.items()}


def block(mode, model, edits):
    return contextlib.nullcontext() if mode == "original" else MODES[mode](model, edits, STRENGTH)


def differences(one, split, edits, modes):
    """{mode: root mean square of the split logits minus the whole model's}, without and with gradients, and whether
    all processes have the same bits."""
    ids = torch.randint(1, one.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(3))
    found, agree = {}, {}
    for mode in ("original", *modes):
        with block(mode, one, edits):
            want = logits(one, ids)
        with block(mode, split, edits) as record:
            got = logits(split, ids)
            graded = logits(split, ids, grad=True).detach()
        if mode in ("hook", "fused", "lora"):
            assert set(record.calls.values()) == {2}, record.calls
        found[mode] = [float((x.double() - want.double()).square().mean().sqrt()) for x in (got, graded)]
        agree[mode] = same_bits(got) and same_bits(graded)
    return found, {mode: everywhere(same, all) for mode, same in agree.items()}


def gradients(one, split, edits, modes):
    """{mode: root mean square of the difference of the gradients of the embedded tokens, over their own}."""
    made = torch.randn(2, 9, one.config.hidden_size, generator=torch.Generator().manual_seed(5)).to(one.dtype)
    found = {}
    for mode in ("original", *modes):
        both = []
        for model in (one, split):
            embedded = made.clone().requires_grad_()
            with block(mode, model, edits):
                model(inputs_embeds=embedded).logits.square().sum().backward()
            both.append(embedded.grad.double())
        found[mode] = float((both[0] - both[1]).norm() / both[0].norm())
    return found


def baked_weights(one, split, edits):
    """Error / bound of the baked elements, and the largest relative difference of the recorded norms."""
    weights = {layer: site.module.weight.detach() for layer, site in mlp_outputs(one, edits).items()}
    exact = {layer: bake_oracle(weights[layer], edits[layer], STRENGTH) for layer in weights}
    bounds = {layer: baked_element_bound(weights[layer], edits[layer], STRENGTH) for layer in weights}
    worst = norms = 0.0
    with baked(one, edits, STRENGTH) as there, baked(split, edits, STRENGTH) as here:
        for layer, site in mlp_outputs(split, edits).items():
            got = whole(site.module.weight).detach().double()
            worst = max(worst, worst_ratio((got - exact[layer]).abs(), bounds[layer]))
            norms = max(norms, *(abs(a / b - 1) for a, b in zip(here.norms[layer], there.norms[layer], strict=True)))
    return everywhere(worst), everywhere(norms)


def refusals(split, folder):
    """{what was asked: the message}, or "" where nothing was refused. The model must be as it was after each."""
    edits = {1: torch.linalg.qr(torch.randn(split.config.hidden_size, 3))[0]}
    offset = {1: oblique(split.config.hidden_size, 3, offset=True)}
    rows = load(folder, torch.float32, True)
    down = rows.model.layers[1].mlp.down_proj
    mesh, weight = down.weight.device_mesh, whole(down.weight).detach()
    down.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
    hidden = load(folder, torch.float32, True)
    hidden.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(local(hidden.model.layers[1].mlp.down_proj.weight))
    mine = load(folder, torch.float32, False)  # split, but not by transformers: nobody sums its outputs
    own = mine.model.layers[1].mlp.down_proj
    own.weight = torch.nn.Parameter(distribute_tensor(own.weight.detach(), mesh, [Shard(1)], src_data_rank=None))
    asked = {
        **{f"rows, {mode}": (lambda mode=mode: MODES[mode](rows, edits)) for mode in MODES},
        **{f"hidden, {mode}": (lambda mode=mode: MODES[mode](hidden, edits)) for mode in MODES},
        **{f"mine, {mode}": (lambda mode=mode: MODES[mode](mine, edits)) for mode in MODES},
        "offset, baked": lambda: baked(split, offset),
        "offset, lora": lambda: adapted(split, offset),
        "4-bit yardstick": lambda: rounded_weights(split, 4),
        "precision yardstick": lambda: in_other_precision(split),
    }
    found = {}
    for name, block in asked.items():
        found[name] = ""
        try:
            with block():
                pass
        except KernelSurgeryError as error:
            found[name] = str(error)
    return found


def overflow(split):
    """An edit whose baked weight overflows in the columns of process 1 alone: refused by both, and undone by both."""
    columns = local(split.model.layers[1].mlp.down_proj.weight).detach()
    kept = columns.clone()
    if dist.get_rank():
        columns[0] = 6.0e4 if split.dtype == torch.float16 else 3.0e38
    edits = {1: torch.eye(split.config.hidden_size)[:, :1].contiguous()}
    try:
        with baked(split, edits, -2.0):
            message = ""
    except KernelSurgeryError as error:
        message = str(error)
    untouched = torch.equal(columns[1:], kept[1:])
    columns.copy_(kept)
    return everywhere((message, untouched), list)


def shared(split):
    """Two layers that share one split weight."""
    layers = split.model.layers
    kept = layers[2].mlp.down_proj.weight
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    u = torch.linalg.qr(torch.randn(split.config.hidden_size, 3))[0]
    try:
        with baked(split, {1: u, 2: u}):
            return ""
    except KernelSurgeryError as error:
        return str(error)
    finally:
        layers[2].mlp.down_proj.weight = kept


def measured(folder):
    dtype = torch.bfloat16 if folder.name.endswith("bf16") else torch.float32
    one, split = load(folder, dtype, False), load(folder, dtype, True)
    edits, modes = edits_of(folder, one), modes_of(folder)
    plain = edits.projections if isinstance(edits, Subspace) else edits
    found = {"layers": by_layer(one, split, plain, modes), "faults": faults(one, split, plain)}
    found["logits"], found["same_bits"] = differences(one, split, edits, modes)
    found["baked"], found["norms"] = baked_weights(one, split, plain)
    found["fingerprint"] = everywhere(fingerprint(one) == fingerprint(split), all)
    found["columns"] = local(split.model.layers[1].mlp.down_proj.weight).shape[1], one.config.intermediate_size
    with fused(split, edits, STRENGTH) as record:
        found["reach"] = sorted(set(record.reach.values()))
    if dtype == torch.float32:
        found["gradients"] = gradients(one, split, edits, modes)
    if isinstance(edits, Subspace):
        local(split.model.layers[3].mlp.down_proj.weight).detach().mul_(1.01)
        with contextlib.suppress(KernelSurgeryError), hooked(split, edits):
            found["other weights"] = "accepted"
        found.setdefault("other weights", "refused")
    if folder.name == "llama":
        found["refusals"] = refusals(split, folder)
        found["overflow"], found["shared"] = overflow(split), shared(split)
    return found


def main(folder, out, recipe):
    results = {path.name: measured(path) for path in sorted(Path(folder).iterdir())}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results, indent=1))
    dist.barrier()
    exec(compile(Path(recipe).read_text(encoding="utf-8"), recipe, "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
