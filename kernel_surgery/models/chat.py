"""How a prompt is put to a model: as it is, or as the user's turn of a chat.

An instruct model was trained on chats. With `--chat on`, a prompt becomes

    apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)

of the tokenizer, and the model writes the assistant's turn. The template writes the special tokens itself, so the
tokenizer adds none: a second BOS token would be a prompt that the model was never trained on.

`--chat auto` is on for an instruct model with a template. A template alone does not show one: the base models of Qwen
carry the template of their instruct models. The rule is:

    on    the model stops at the token that ends the assistant's turn in its template. The tokens at which a model stops
          are in generation_config.json, config.json and the tokenizer.
    on    that turn ends without a special token, and the model's name holds the word instruct, chat or it.
    off   otherwise.

Qwen2.5-3B stops at <|endoftext|>, but a turn ends with <|im_end|>: off. Qwen2.5-3B-Instruct and SmolLM2-Instruct stop
at <|im_end|>, and Llama-3-Instruct at <|eot_id|>: on. The embedded model has no template: off.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import CHATS
from kernel_surgery.files.contents import TEMPLATES
from kernel_surgery.models.load import load_tokenizer, local_folder, public_name, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCH = "enable_thinking"  # the name that templates use, since Qwen3
# Some templates name the day. A fixed one gives the same prompts every day; it is the default of Llama 3.1.
DAY = "26 Jul 2024"
THINK, THOUGHT = "<think>", "</think>"
_ANSWER = "kernelsurgery"
_INSTRUCT = re.compile(r"(?<![a-z])(instruct|chat|it)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Chat:
    """How prompts are put to a model.

    on: as the user's turn of a chat, instead of as they are. thinking: where the template has a switch for it.
    template: the SHA-256 of the chat template, or None. alone: moments read prompts in the chat alone (`forms`).
    """

    on: bool = False
    thinking: bool = False
    template: str | None = None
    alone: bool = False

    def record(self) -> dict[str, Any]:
        """Return the fields of every record. With `on` they decide a prompt's text, together with the tokenizer."""
        if not self.on:
            return {"chat": "off"}
        return {"chat": "on", "thinking": self.thinking, "chat_template": self.template}

    @property
    def forms(self) -> tuple["Chat", ...]:
        """The ways in which moments read every prompt: as a chat and as it is, or as it is alone.

        An edit that is fitted on chats alone breaks plain text, which it has not seen (docs/real.md, Chats).
        """
        return (self, OFF) if self.on and not self.alone else (self,)

    def text(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
        """Return the text that the model reads. Raises UserError if the template cannot be applied."""
        if not self.on:
            return prompt
        return rendered(tokenizer, [{"role": "user", "content": prompt}], turn=True, thinking=self.thinking)

    def ids(self, tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
        """Return the token ids that the model reads. Raises UserError if the template cannot be applied."""
        if not self.on:
            return list(tokenizer(prompt).input_ids)
        return list(tokenizer(self.text(tokenizer, prompt), add_special_tokens=False).input_ids)

    def opener(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return "<think>" if the template writes it before the model does, else an empty text."""
        return THINK if self.on and self.text(tokenizer, "1 + 1").rstrip().endswith(THINK) else ""


OFF = Chat()


def rendered(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], *, turn: bool, thinking: bool = False
) -> str:
    """Return messages as the chat template writes them. turn: begin the assistant's turn at the end.

    Raises UserError if the template cannot be applied.
    """
    from jinja2 import TemplateError

    try:
        options: dict[str, Any] = {SWITCH: thinking, "date_string": DAY}
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=turn, tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template cannot be applied ({reason}). Use --chat off.") from error


def choose_chat(name: str, asked: str = "auto", *, thinking: bool = False) -> Chat:
    """Return how prompts are put to a model. It reads the tokenizer and configuration files, not the weights.

    name: as in `models.load.load_model`. asked: auto, on or off; the module has the rule of auto.

    Raises UserError for any other word, for "on" without a chat template, and for `thinking` without a chat or without
    a switch for it in the template.
    """
    if asked not in CHATS:
        raise UserError(f"--chat is {asked!r}: choose from {', '.join(CHATS)}.")
    needs_chat = "--thinking is for prompts that are put as a chat, but "
    if asked == "off":
        if thinking:
            raise UserError(f"{needs_chat}--chat is off.")
        return OFF
    folder, public = local_folder(resolve_model(name)), public_name(name)
    if not has_template(folder):
        if asked == "on" or thinking:
            what = "--chat on" if asked == "on" else "--thinking"
            raise UserError(f"{what} needs a chat template, and the tokenizer of {public!r} has none. Use --chat off.")
        return OFF
    tokenizer = load_tokenizer(str(folder))
    if asked == "auto" and not made_for_chat(tokenizer, stops(folder), public):
        if thinking:
            raise UserError(f"{needs_chat}{public!r} is not an instruct model. Add --chat on if it is one.")
        return OFF
    template = str(tokenizer.get_chat_template())
    if thinking and SWITCH not in template:
        raise UserError(f"--thinking: the chat template of {public!r} has no switch {SWITCH}. Leave it out.")
    return Chat(True, thinking, hashlib.sha256(template.encode()).hexdigest())


def made_for_chat(tokenizer: "PreTrainedTokenizerBase", stops: set[int], name: str) -> bool:
    """Return whether a model with a chat template is an instruct model, by the rule of the module.

    stops: the token ids at which its texts end. name: the model's.
    """
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": _ANSWER}]
    tail = rendered(tokenizer, messages, turn=False).rpartition(_ANSWER)[2]
    known = tokenizer.added_tokens_decoder
    ids = tokenizer(tail, add_special_tokens=False).input_ids if tail else []
    ending = next((i for i in ids if i in known and known[i].special), None)
    if ending is None:
        return bool(_INSTRUCT.search(name))
    return ending in stops | {tokenizer.eos_token_id}


def stops(folder: Path) -> set[int]:
    """Return the token ids at which a model's texts end, from its two configuration files."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        try:
            held = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        declared = held.get("eos_token_id") if isinstance(held, Mapping) else None
        found |= {i for i in (declared if isinstance(declared, list) else [declared]) if isinstance(i, int)}
    return found


def has_template(folder: Path) -> bool:
    """Return whether a model's folder holds a chat template. The tokenizer is not loaded."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        held = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    inline = isinstance(held, Mapping) and bool(held.get("chat_template"))
    return inline or any((folder / TEMPLATES).glob("*.jinja"))
