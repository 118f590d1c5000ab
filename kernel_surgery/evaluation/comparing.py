"""The texts of the original and of one edit, for `compare`: from a loaded model, or from vLLM, an engine after another.

Both ways first check everything that can be checked, and return the first line of the output with a function that then
writes the texts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernel_surgery.checkpoint.source import check_edit
from kernel_surgery.common.progress import progress_bar
from kernel_surgery.damage.measure import headline, measure_damage
from kernel_surgery.engines.offline import EngineOptions, require_vllm
from kernel_surgery.engines.texts import parse_arguments
from kernel_surgery.engines.variants import engine_modes, variants
from kernel_surgery.evaluation.generate import stored_end_tokens
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.served import EngineAsking, writing
from kernel_surgery.evaluation.sidebyside import Pair, compare_texts
from kernel_surgery.models.before import check_files, load_checked
from kernel_surgery.models.chat import Chat
from kernel_surgery.subspace.artifact import Subspace

LANGUAGES = ("en", "zh")  # in which --damage measures

Comparing = tuple[str, Callable[[], list[Pair]]]


def in_model(
    options: Options,
    prompts: Sequence[str],
    subspace: Subspace,
    chat: Chat,
    where: tuple[torch.dtype, torch.device],
    *,
    damage: bool,
) -> Comparing:
    """Load the model, and measure the damage if `damage` is set. Return the first line, and what writes the pairs.

    where: the model's dtype and device. Raises what `load_checked` and `check_edit` raise.
    """

    def check(folder: Path, config: dict[str, Any]) -> None:
        check_edit(folder, subspace, [options.mode], force=options.force)

    model, tokenizer = load_checked(options.model, where, prompts, options.budget, check, chat=chat)
    edit: dict[str, Any] = {"strength": options.strength, "force": options.force}
    measured = measure_damage(model, tokenizer, LANGUAGES, [options.mode], subspace, **edit) if damage else None
    first = headline(measured, "python -m kernel_surgery.eval measures it, and so does --damage")
    edit |= {"mode": options.mode, "max_new_tokens": options.budget, "chat": chat}
    return first, partial(compare_texts, model, tokenizer, prompts, subspace, **edit)


def in_vllm(
    options: Options, prompts: Sequence[str], subspace: Subspace, chat: Chat, dtype: torch.dtype
) -> Comparing:
    """Check the model's files and the edit. Return the first line, and what starts the engines and writes the pairs.

    Raises UserError if vLLM is not installed, and what `check_files` and `check_edit` raise; the function that is
    returned raises what `engines.variants.variants` and `engines.offline.started` raise.
    """

    def check(folder: Path, config: dict[str, Any]) -> None:
        check_edit(folder, subspace, [options.mode], force=options.force)

    source, _, tokenizer, longest = check_files(options.model, prompts, options.budget, check, chat)
    name, more = require_vllm(), parse_arguments(options.engine_args)
    engine = EngineOptions(longest + options.budget, dtype, options.tensor_parallel, more)
    asking = EngineAsking(tokenizer, (), (), options.budget, chat, stored_end_tokens(source, tokenizer))
    modes = engine_modes(options.mode, options.engine)

    def write() -> list[Pair]:
        texts = []
        with (
            variants(modes, source, subspace, options.strength, force=options.force) as (found, _),
            progress_bar(len(modes) * len(prompts), unit="text", leave=False) as bar,
        ):
            for mode in modes:
                bar.set_description(mode)
                with writing(asking, found[mode], engine):
                    texts.append([one.text for one in asking.write(prompts, bar.update)])
        return [Pair(*one) for one in zip(prompts, *texts, strict=True)]

    return headline(None, f"{name} gives no logits; without --engine, --damage measures it"), write
