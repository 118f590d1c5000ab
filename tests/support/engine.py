"""A stand-in for vLLM: it loads what the engine would load, and writes the texts with transformers."""

from contextlib import contextmanager, nullcontext

import torch

from kernel_surgery.edit.modes import applied
from kernel_surgery.engines.texts import cut
from kernel_surgery.evaluation import comparing, served
from kernel_surgery.evaluation.generate import checkpoint_settings_aside, greedy_config
from kernel_surgery.models.load import load_model
from kernel_surgery.models.padding import padded
from kernel_surgery.studies import opening

NAME = "vLLM 0"


class StandIn:
    """A running engine (`engines.offline.Engine`) of one variant."""

    def __init__(self, model, asked):
        self.model, self.asked = model, asked

    def texts(self, prompts, *, max_new_tokens, ends, advance=lambda done: None):
        self.asked.append(len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # as `generate` batches them
        ids, mask = padded([prompts[i] for i in order], ends[0], "left", "cpu")
        config = greedy_config(max_new_tokens, ends, ends[0])
        with checkpoint_settings_aside(self.model), torch.no_grad():
            made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        rows = dict(zip(order, made[:, ids.shape[1] :].tolist(), strict=True))
        advance(len(prompts))
        return [cut(rows[i], ends) for i in range(len(prompts))]


def stand_in(monkeypatch):
    """Put stand-ins in the place of vLLM. Return a list, to which each start adds a dict.

    {"variant": what it loaded, "options", "files": how many files the adapter or checkpoint had, "asked": a list of how
    many texts each call asked}
    """
    starts = []

    @contextmanager
    def started(variant, options):
        model = load_model(str(variant.model), options.dtype, torch.device("cpu"))
        written = variant.adapter or variant.model
        start = {"variant": variant, "options": options, "files": len(list(written.iterdir())), "asked": []}
        starts.append(start)
        edit = nullcontext()
        if (settings := variant.settings) is not None:
            edit = applied("fused", model, settings.load(), settings.strength, settings.force)
        with edit:
            yield StandIn(model, start["asked"])

    monkeypatch.setattr(served, "started", started)
    for module in (served, comparing, opening):
        monkeypatch.setattr(module, "require_vllm", lambda: NAME)
    return starts
