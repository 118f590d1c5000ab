"""A pico model of any architecture in vLLM, with and without the edit, beside transformers and a float64 oracle."""

import copy
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.edit.modes import applied
from kernel_surgery.engines.offline import EngineOptions, started
from kernel_surgery.engines.settings import PluginSettings
from kernel_surgery.engines.variants import Variant
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import oblique
from tests.support.picos import fields, pico_of

D, LAYERS, TOKENS, END = 128, (1, 2), 8, 0
PROMPTS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
LIMIT = 2.0  # an edit's error may be so many times the original's, as in `certify.engine`
# The attention of vLLM's CPU engine takes heads of 32.
_SHAPE: dict[str, Any] = {"hidden_size": D, "num_attention_heads": 4, "head_dim": 32}
# Fields that checkpoints on the hub have and vLLM reads, though transformers does not; and sizes that its kernels take.
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64}
_HUB: dict[str, dict[str, Any]] = {
    "lfm2": {"block_dim": D, "block_ff_dim": 96},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v2": _MLA,
    "deepseek_v3": {"topk_method": "noaux_tc", **_MLA},
    "glm4_moe_lite": _MLA,
    "hunyuan_v1_moe": {"moe_intermediate_size": 96},
    "mpt": {"d_model": D},
    "falcon": {"head_dim": None},
}


def _shape(kind: str) -> dict[str, Any]:
    """The fields of a pico model for vLLM. It reads fields that transformers' configuration does not have, so those
    that other model types share are left out."""
    plain = AutoConfig.for_model(kind)
    given = fields(kind) | _SHAPE
    unknown = {} if plain.sub_configs else {name: None for name in given if not hasattr(plain, name)}
    return _SHAPE | unknown | _HUB.get(kind, {})


@contextmanager
def pico_files(kind: str):
    """Yield (model, folder, Subspace). The folder holds the model, and the subspace as s.safetensors."""
    model = pico_of(kind, **_shape(kind))
    edits = {layer: oblique(D, 3, layer, spread=3.0) for layer in LAYERS}
    known = {"fingerprint": fingerprint(model), "n_layers": 4, "site": "mlp_out", "strengths": {2: 0.5}}
    subspace = Subspace.of(edits, **known)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model.save_pretrained(path / "model")
        subspace.save(path / "s.safetensors")
        yield model, path, subspace


def logits(model, ids):
    """[texts, tokens, words] of lists of token ids of one length."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits


def greedy(model, prompts):
    """The texts after each prompt, and the smallest difference of the two best logits at every token of each."""
    ids, gaps = [list(prompt) for prompt in prompts], []
    for _ in range(TOKENS):
        last = logits(model, ids)[:, -1]
        best = last.topk(2).values
        gaps.append((best[:, 0] - best[:, 1]).tolist())
        ids = [[*row, int(token)] for row, token in zip(ids, last.argmax(-1), strict=True)]
    return ids, list(zip(*gaps, strict=True))


def log_probabilities(model, ids):
    """[texts, tokens - 1] float64: of every token after the first."""
    found = logits(model, ids).double().log_softmax(-1)[:, :-1]
    return found.gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]


def compared(kind: str, modes=("original", "fused"), *, keep=False) -> dict[str, Any]:
    """Run a model in vLLM in each mode. Return {mode: what was found}, with the original first.

    {"error": of vLLM's log probabilities, the largest, from those of the exact edit in float64. "here": the same of
    transformers, with mode hook. "yardstick": the larger of here and of the original's error in vLLM. "effect": how far
    the edit moves them. "texts", "same", "ties": how many greedy texts there are, are those of transformers, and differ
    at a near tie, where the two best logits are closer than what both sides may be off.}

    keep: note why a mode cannot be run, {"refused": the reason}, and go on. Otherwise the error is raised.
    """
    rows: dict[str, Any] = {}
    with pico_files(kind) as (model, folder, subspace):
        wide = copy.deepcopy(model).double()
        wide.set_experts_implementation("eager")  # the other ones take no float64
        # First all of transformers: in this process, vLLM may change its classes.
        expected = {ours: _expected(ours, model, wide, subspace) for ours in ("original", "hook")}
        for mode in modes:
            try:
                row = _run(_variant(mode, folder, subspace), expected["original" if mode == "original" else "hook"])
            except Exception as error:
                if not keep:
                    raise
                rows[mode] = {"refused": reason(error)}
                if mode == "original":
                    break
                continue
            rows[mode] = row | {"yardstick": max(row["here"], rows.get("original", row)["error"])}
    return rows


def reason(error: Exception) -> str:
    """The line of an error that says why, without the folder of this run."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r"(/\S+)?/tmp\w+/", "", line)


def _variant(mode: str, folder: Path, subspace: Subspace) -> Variant:
    own = Variant("original", folder / "model", folder / "model")
    if mode == "fused":
        return replace(own, mode=mode, settings=PluginSettings(folder / "s.safetensors"))
    if mode == "lora":
        write_adapter(folder / "model", subspace, folder / "adapter")
        return replace(own, mode=mode, adapter=folder / "adapter")
    return own


@dataclass(frozen=True)
class _Expected:
    """What transformers finds: texts with their prompts, the gap of the two best logits at every new token, and log
    probabilities: in float32, and in float64 with and without the edit."""

    ids: list[list[int]]
    gaps: list[tuple[float, ...]]
    here: torch.Tensor
    exact: torch.Tensor
    unedited: torch.Tensor


def _expected(mode: str, model, wide, subspace: Subspace) -> _Expected:
    """model, wide: in float32 and float64."""
    with applied(mode, model, subspace, 1.0, True):
        ids, gaps = greedy(model, PROMPTS)
        here = log_probabilities(model, ids)
    with applied(mode, wide, subspace, 1.0, True):
        exact = log_probabilities(wide, ids)
    return _Expected(ids, gaps, here, exact, log_probabilities(wide, ids))


def _run(variant: Variant, expected: _Expected) -> dict[str, Any]:
    """What `compared` says of one mode, but for the yardstick."""
    more = {"enforce_eager": True, "skip_tokenizer_init": True}
    with started(variant, EngineOptions(64, torch.float32, 1, more)) as engine:
        found = torch.stack(engine.log_probabilities(expected.ids))
        texts = engine.texts(PROMPTS, max_new_tokens=TOKENS, ends=[END])
    given = {"error": found, "here": expected.here, "effect": expected.unedited}
    row = {name: float((t - expected.exact).abs().max()) for name, t in given.items()}
    own = [text[len(PROMPTS[0]) :] for text in expected.ids]
    return row | _texts(own, expected.gaps, texts, 4 * (row["error"] + row["here"]))


def _texts(own, gaps, theirs, noise) -> dict[str, Any]:
    same = ties = 0
    for text, gap, other in zip(own, gaps, theirs, strict=True):
        text = text[: text.index(END)] if END in text else text
        written = list(other.ids)
        at = next((i for i in range(TOKENS) if text[i : i + 1] != written[i : i + 1]), None)
        same += at is None
        ties += at is not None and gap[at] <= noise
    return {"texts": len(own), "same": same, "ties": ties}


def wrong(rows: dict[str, Any]) -> list[str]:
    """What is not right in what `compared` returned, in words."""
    faults = []
    for mode, row in rows.items():
        if "refused" in row:
            continue
        limit = 2 * LIMIT * row["here"] if mode == "original" else LIMIT * row["yardstick"]
        if not row["error"] <= limit:
            faults.append(f"{mode}: log probabilities are off by {row['error']:.3g}, at most {limit:.3g}")
        if row["same"] + row["ties"] < row["texts"]:
            faults.append(f"{mode}: {row['texts'] - row['same'] - row['ties']} texts differ, and are no near ties")
        if mode != "original" and not row["effect"] > 2 * limit:  # a missing edit is off by its effect
            faults.append(f"{mode}: the edit cannot be seen")
    return faults
