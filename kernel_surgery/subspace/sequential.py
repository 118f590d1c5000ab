"""Fit the edit of each layer on the model that already has the edits before it.

Edits that are fitted one by one to the original model do not fit each other: the first ones change what the later
layers write, so the later ones remove the wrong part. Here the activations stream through the model once, layer by
layer. At an edited layer the moments are taken, the edit is fitted, and the layer runs again with its edit.

One decoder layer is in memory at a time, read from the checkpoint's files, and the hidden states of all prompts. So a
model that does not fit in memory can be fitted. After each layer the state is written to disk, and a fit that was
killed goes on at the layer where it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import BATCH_TOKENS, ERASING
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.models.before import check_positions
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.states import on_states
from kernel_surgery.models.stored import sampled
from kernel_surgery.numerics.precision import name_of
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.problems.generator import Problem
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.collecting import digest, in_forms
from kernel_surgery.subspace.erasing import SHRINKAGE, erasing_edit
from kernel_surgery.subspace.fingerprint import sample_weights
from kernel_surgery.subspace.moments import Moments
from kernel_surgery.subspace.partial import Partial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Stream:
    """All prompts between two decoder layers, in batches of one length each: no padding.

    hidden: [prompts, tokens, d_model] of each batch, on the CPU. languages: [prompts] of each batch, whole numbers.
    keep_first: whether the first token of a prompt is counted.
    """

    hidden: list[Tensor]
    languages: list[Tensor]
    keep_first: bool

    @property
    def tokens(self) -> int:
        """All tokens, counted or not."""
        return sum(x.shape[0] * x.shape[1] for x in self.hidden)

    def counted(self, states: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return the states of a batch that are counted, [n, d_model], and their languages, [n]."""
        kept = states if self.keep_first else states[:, 1:]
        languages = self.languages[batch].to(states.device)[:, None].expand(kept.shape[:2])
        return kept.reshape(-1, kept.shape[-1]), languages.reshape(-1)


@dataclass
class Fitted:
    """What is fitted so far. singular, means: as in a subspace file. left: {layer: `covariance_left`}."""

    edits: dict[int, Projection] = field(default_factory=dict)
    singular: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    left: dict[int, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as named tensors."""
        named: dict[str, Tensor] = {}
        for layer, edit in self.edits.items():
            parts = {"basis": edit.basis, "dual": edit.dual, "offset": edit.offset}
            parts |= {"singular": self.singular[layer], "mean": self.means[layer]}
            parts["left"] = torch.tensor(self.left[layer], dtype=torch.float64)
            named |= {f"{layer}.{name}": part for name, part in parts.items() if part is not None}
        return named

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Fitted":
        """Return what `tensors` gave."""
        fitted = cls()
        for layer in sorted({int(name.partition(".")[0]) for name in tensors}):
            own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{layer}.")}
            fitted.edits[layer] = Projection(own["basis"], own.get("dual"), own.get("offset"))
            fitted.singular[layer], fitted.means[layer] = own["singular"], own["mean"]
            fitted.left[layer] = float(own["left"])
        return fitted


def batches_of(encoded: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Return batches of prompts that have the same length, as indices: at most `tokens` each, and at least a prompt."""
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    batches = []
    for length, indices in sorted(by_length.items()):
        size = max(1, tokens // length)
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


@contextmanager
def _at_site(site: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Give the MLP block's output to `see` while the block runs. What it returns, if anything, replaces it."""
    handle = site.register_forward_hook(on_states(lambda module, inputs, states: see(states)))
    try:
        yield
    finally:
        handle.remove()


def run_layer(
    reader: Layerwise,
    index: int,
    stream: Stream,
    see: Callable[[Tensor, int], Tensor | None] | None = None,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Iterator[Tensor]:
    """Run layer `index`, which is filled, over all batches. Yield the hidden states after it, on the CPU.

    see: called with the MLP block's output and the number of the batch; see `_at_site`. advance: called with the
    number of tokens that were run.
    """
    block, site = decoder_layers(reader.model)[index], reader.output(index)
    for number, hidden in enumerate(stream.hidden):
        calls = reader.calls(hidden.shape[0], hidden.shape[1])
        with torch.no_grad(), _at_site(site, lambda y, n=number: see(y, n) if see else None):  # type: ignore[misc]
            after = calls.run(index, block, hidden.to(reader.device))
        yield after.cpu()
        advance(hidden.shape[0] * hidden.shape[1])


def edited(y: Tensor, edit: Projection) -> Tensor:
    """Return y - A (B^T y - c) for rows y [..., d_model]: float32 or wider, with one rounding to y's dtype."""
    wide = y if y.dtype == torch.float64 else y.float()
    inside = wide @ edit.reads.to(wide)
    if edit.offset is not None:
        inside = inside - edit.offset.to(wide)
    return (wide - inside @ edit.basis.to(wide).T).to(y.dtype)


def covariance_left(before: Moments, after: Moments) -> float:
    """Return how much of the covariance with the language label is left: norm after over norm before."""
    return float(after.label_covariance.norm() / before.label_covariance.norm())


def fit_layer(
    reader: Layerwise,
    index: int,
    stream: Stream,
    n_languages: int,
    options: dict[str, Any],
    advance: Callable[[int], object],
) -> tuple[list[Tensor], Projection, Tensor, Tensor, float]:
    """Fit the edit of one layer and run the layer with it.

    options: of `subspace.erasing.erasing_edit`. Returns (hidden states after the layer, edit, singular values, mean
    activation, `covariance_left` at the site).
    """
    d = reader.config.hidden_size
    before, after = (Moments.empty(n_languages, d, reader.device) for _ in range(2))
    with reader.layer(index):

        def measure(y: Tensor, batch: int) -> None:
            before.add(*stream.counted(y, batch))

        for _ in run_layer(reader, index, stream, measure, advance):
            pass
        if not bool(torch.isfinite(before.second).all()):
            raise SubspaceError(f"the activations of layer {index} hold NaN or Inf. Fit in float32 or bfloat16.")
        edit, singular = erasing_edit(before, what=f"layer {index}", **options)
        edit, mean = edit.to("cpu"), before.mean.float().cpu()

        def change(y: Tensor, batch: int) -> Tensor:
            new = edited(y, edit.to(y.device))
            after.add(*stream.counted(new, batch))
            return new

        hidden = list(run_layer(reader, index, stream, change, advance))
    return hidden, edit, singular.float().cpu(), mean, covariance_left(before, after)


def fit_sequentially(
    reader: Layerwise,
    tokenizer: "PreTrainedTokenizerBase",
    chosen: Sequence[Problem],
    languages: Sequence[str],
    layers: Sequence[int],
    *,
    method: str = "oblique",
    rank: int | None = None,
    shrinkage: float | None = SHRINKAGE,
    keep_first: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    about: dict[str, Any] | None = None,
    partial: Partial | None = None,
    chat: Chat = OFF,
) -> Subspace:
    """Fit the edits of `layers`, in order, each on the model with the edits before it. Return the subspace.

    reader: the model, one layer at a time. chosen, languages: the problems, in at least two languages. method, rank,
    shrinkage: as in `subspace.fitting.fit_subspace`; only "leace" and "oblique" can be fitted so. keep_first: count the
    first token of every prompt too. batch_tokens: of one forward pass. about: further fields of the record, such as
    "model_id". partial: where the state is kept after each layer (`subspace.partial.resuming`). chat: how the prompts
    are put to the model; in a chat, each is read twice, in the template and as it is.

    The record's fit has "sequential": {layer: how much of the covariance with the language label is left at the site,
    on the fitting tokens}.

    Memory: one decoder layer, the hidden states of all tokens, and one batch. Numerics: the model's dtype; moments and
    fits in float64; edits in float32.

    Raises SubspaceError for another method, for one language alone, for activations that are not finite, and what
    `erasing_edit` raises; ModelError for prompts that are too long.
    """
    if method not in ERASING:
        raise SubspaceError(f"cannot fit {method!r} layer by layer; known: {', '.join(ERASING)}")
    if len(languages) < 2:
        raise SubspaceError(f"a language subspace needs at least two languages, got {', '.join(languages) or 'none'}.")
    prompts = [problem.prompts[language] for language in languages for problem in chosen]
    encoded = [form.ids(tokenizer, prompt) for form in chat.forms for prompt in prompts]
    check_positions(getattr(reader.config, "max_position_embeddings", None), map(len, encoded))
    labels = torch.arange(len(languages)).repeat_interleave(len(chosen)).repeat(len(chat.forms))
    batches = batches_of(encoded, batch_tokens)
    stream = Stream([], [labels[batch] for batch in batches], keep_first)
    known = (about or {}) | chat.record() | in_forms(chat)
    record = _record(reader, chosen, languages, known, method, shrinkage, keep_first)
    fitted, layers, start = Fitted(), sorted(layers), 0
    settings = record | {"layers": layers, "rank": rank, "batch_tokens": batch_tokens, "prompts": digest(encoded)}
    if partial is not None:
        start = partial.begin(settings, layers[-1] + 1, "layers")
    if start:
        assert partial is not None
        state = partial.load_state()
        stream.hidden = [state.pop(f"hidden.{number}") for number in range(len(batches))]
        fitted = Fitted.of(state)
    else:
        stream.hidden = [reader.embed(torch.tensor([encoded[i] for i in batch])).cpu() for batch in batches]
    options = {"rank": rank, "affine": method == "leace", "shrinkage": shrinkage}
    passes = [1 + (index in layers) for index in range(layers[-1] + 1)]
    total, done = stream.tokens * sum(passes), stream.tokens * sum(passes[:start])
    with progress_bar(total, "fit", unit="token", unit_scale=True, initial=done, leave=False) as bar:
        for index in range(start, layers[-1] + 1):
            if index in layers:
                own = fit_layer(reader, index, stream, len(languages), options, bar.update)
                stream.hidden, fitted.edits[index], fitted.singular[index], fitted.means[index] = own[:4]
                fitted.left[index] = own[4]
            else:
                with reader.layer(index):
                    stream.hidden = list(run_layer(reader, index, stream, None, bar.update))
            if partial is not None:
                hidden = {f"hidden.{number}": x.contiguous() for number, x in enumerate(stream.hidden)}
                partial.add_state(index + 1, hidden | fitted.tensors())
    counts = torch.zeros(len(languages), dtype=torch.long)
    for batch, x in zip(stream.languages, stream.hidden, strict=True):
        counts.index_add_(0, batch, torch.full_like(batch, x.shape[1] - (not keep_first)))
    return _subspace(fitted, record, dict(zip(languages, counts.tolist(), strict=True)))


def _record(
    reader: Layerwise,
    chosen: Sequence[Problem],
    languages: Sequence[str],
    about: dict[str, Any],
    method: str,
    shrinkage: float | None,
    keep_first: bool,
) -> dict[str, Any]:
    """Return what is known of the fit before it begins."""
    return {
        "n_layers": reader.layers,
        "fingerprint": sample_weights(sampled(reader.folder).items()),
        "method": method,
        "languages": list(languages),
        "shrinkage": "oas" if shrinkage is None else shrinkage,
        "problems": len(chosen),
        "dtype": name_of(reader.dtype),
        "first_token": "kept" if keep_first else "left out",
        **about,
    }


def _subspace(fitted: Fitted, record: dict[str, Any], tokens: dict[str, int]) -> Subspace:
    own = ("model_id", "revision", "n_layers", "fingerprint")
    fit = {name: value for name, value in record.items() if name not in own}
    first = next(iter(fitted.edits.values()))
    return Subspace.of(
        fitted.edits,
        means=fitted.means,
        spectrum=fitted.singular,
        site="mlp_out",
        pool="tokens",
        model_id=record.get("model_id"),
        revision=record.get("revision"),
        n_layers=record["n_layers"],
        fingerprint=record["fingerprint"],
        fit=fit
        | {"rank": first.basis.shape[1], "tokens": tokens, "environment": environment_record()}
        | {"sequential": {str(layer): left for layer, left in fitted.left.items()}},
    )
