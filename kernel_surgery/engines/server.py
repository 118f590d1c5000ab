"""A server of the OpenAI protocol: vLLM, SGLang, llama.cpp, TGI and others, through the openai client.

Prompts go to /v1/completions as token ids, so the server's chat template and special tokens play no part. For a server
that takes only text, `text_prompts` sends the text of these ids; what the server says it read must have their number.

vLLM returns the ids that it wrote. Of any other server the text is tokenized again, which may give other tokens for the
same text. What a server edits cannot be checked here.

The requests are tasks of one event loop, `in_flight` at a time. An error, or Ctrl-C, cancels the others at once and
closes their connections, so that the server need not finish them.
"""

import asyncio
import importlib.util
import os
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from kernel_surgery.common.errors import KernelSurgeryError, UserError
from kernel_surgery.engines.texts import EngineText, cut
from kernel_surgery.engines.variants import ENGINE_MODES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TIMEOUT_S = 600.0  # of one try of one request
RETRIES = 5  # of one request, after errors that may pass: connection, timeout, 408, 409, 429 and 5xx
KEY = "OPENAI_API_KEY"
# Why a text ended, in the words of the protocol and of TGI. A text that ended otherwise (an abort, a content filter) is
# not what the model writes.
_ENDED = {"stop": "stop", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}
# Greedy means the model's own best token: a server may take penalties from generation_config.json otherwise.
# stop_token_ids and repetition_penalty are fields of vLLM and SGLang, repeat_penalty of llama.cpp. Others ignore them.
_PLAIN = {"repetition_penalty": 1.0, "repeat_penalty": 1.0, "return_token_ids": True}
_ADDRESS = re.compile(r"@(?=https?://)")
_SHOWN = 300  # characters of a server's message

Result = TypeVar("Result")


def require_openai() -> None:
    """Raise UserError if the openai client is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise UserError('--engine openai needs the openai client: pip install openai.')


def read_served(given: Iterable[str], base_url: str | None) -> dict[str, tuple[str, str]]:
    """Read `MODE=NAME` or `MODE=NAME@URL`. Return {mode: (the name of the served model, the address)}.

    base_url: where no URL is given. A name may hold "=", ":" and "@". Raises UserError for another form, an unknown
    mode, an address that is none, and two modes that are the same model.
    """
    found: dict[str, tuple[str, str]] = {}
    for text in given:
        mode, equals, rest = text.partition("=")
        name, *url = _ADDRESS.split(rest, maxsplit=1)
        if mode not in ENGINE_MODES or not equals or not name:
            raise UserError(
                f"--served takes MODE=NAME or MODE=NAME@URL with MODE one of {', '.join(ENGINE_MODES)}, got "
                f"{mode + equals + name!r}."
            )
        if mode in found:
            raise UserError(f"--served names mode {mode} twice.")
        address = url[0] if url else base_url
        if not address:
            raise UserError(
                f"--served {mode}={name} has no address: add --base-url URL, such as http://localhost:8000/v1."
            )
        if not _is_address(address):
            raise UserError(
                f"the address of --served {mode}={name} must be like http://localhost:8000/v1, with http:// or "
                f"https:// and a host, got {shown(address)!r}."
            )
        if same := [other for other, model in found.items() if model == (name, address)]:
            raise UserError(f"--served: {same[0]} and {mode} are the same model, {name!r} at {shown(address)}.")
        found[mode] = (name, address)
    return found


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def shown(address: str) -> str:
    """Return an address as it may be printed: without a user, a password and a query."""
    return re.sub(r"(?<=//)[^/]*@", "", address).partition("?")[0]


class Server:
    """One model on a server.

    name: as the server calls it. base_url: the address, up to and with /v1. tokenizer: of the model, for texts whose
    token ids the server does not return. in_flight: how many requests the server has at a time. timeout_s: of one try
    of one request. text_prompts: send prompts as text.

    The environment variable OPENAI_API_KEY is the key that is sent. It is in no message.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        tokenizer: "PreTrainedTokenizerBase",
        in_flight: int,
        *,
        timeout_s: float = TIMEOUT_S,
        text_prompts: bool = False,
    ):
        require_openai()
        self.name, self.base_url, self.tokenizer, self.in_flight = name, base_url, tokenizer, in_flight
        self.timeout_s, self.text_prompts, self.key = timeout_s, text_prompts, os.environ.get(KEY) or None

    def check(self, prompt: Sequence[int], ends: Sequence[int]) -> None:
        """Ask for the served models, and for one token after `prompt`. prompt, ends: token ids.

        Raises UserError if the server does not answer, does not serve the model, or does not take the request.
        """
        _finished(self._check(prompt, ends))

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        advance: Callable[[int], object] = lambda done: None,
    ) -> list[EngineText]:
        """Write greedy texts, as in `engines.texts.Writer`.

        Raises KernelSurgeryError for a request that failed after all its retries, and for an answer that is not a text
        of the model. The other requests are cancelled.
        """
        return _finished(self._texts(prompts, max_new_tokens, ends, advance))

    def _client(self, retries: int) -> Any:
        from openai import AsyncOpenAI

        key = self.key or "none"  # the client must have one
        return AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout_s, max_retries=retries)

    async def _check(self, prompt: Sequence[int], ends: Sequence[int]) -> None:
        from openai import OpenAIError

        where = shown(self.base_url)
        async with self._client(1) as client:
            try:
                answer = await client.with_options(timeout=min(10.0, self.timeout_s)).models.list()
                served = [model.id for model in answer.data]
            except (OpenAIError, ValueError, AttributeError, TypeError) as error:
                reason, hint = self._reason(error), _hint(error)
                raise UserError(f"no list of models from {where}/models: {reason}.{hint}") from self._cause(error)
            # SGLang calls an adapter BASE:ADAPTER, and lists the base.
            if self.name not in served and self.name.rpartition(":")[0] not in served:
                raise UserError(f"{where} serves no model {self.name!r}, only {', '.join(served) or 'none'}.")
            try:
                await self._ask(client, prompt, 1, ends)
            except KernelSurgeryError as error:
                more = "" if self.text_prompts else " If it takes no token ids as prompts, add --text-prompts."
                raise UserError(f"{error}{more}") from error.__cause__

    async def _texts(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Sequence[int],
        advance: Callable[[int], object],
    ) -> list[EngineText]:
        waiting, found = iter(enumerate(prompts)), dict[int, EngineText]()
        async with self._client(RETRIES) as client:

            async def ask_on() -> None:
                for at, prompt in waiting:  # all take from the same iterator
                    found[at] = await self._ask(client, prompt, max_new_tokens, ends)
                    advance(1)

            asking = [asyncio.create_task(ask_on()) for _ in range(min(self.in_flight, len(prompts)))]
            try:
                await asyncio.gather(*asking)
            except KernelSurgeryError as error:
                raise KernelSurgeryError(
                    f"{error} The texts of every mode and language that was finished are kept: go on with --resume."
                ) from error.__cause__
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return [found[at] for at in range(len(prompts))]

    async def _ask(self, client: Any, prompt: Sequence[int], max_new_tokens: int, ends: Sequence[int]) -> EngineText:
        from openai import OpenAIError

        try:
            answer = await client.completions.create(
                model=self.name,
                prompt=as_text(self.tokenizer, prompt) if self.text_prompts else list(prompt),
                **{"max_tokens": max_new_tokens, "temperature": 0.0},
                **{"frequency_penalty": 0.0, "presence_penalty": 0.0},
                extra_body=_PLAIN | {"stop_token_ids": list(ends)},
            )
        except (OpenAIError, ValueError) as error:
            if isinstance(error, KernelSurgeryError):
                raise
            raise self._error(f"did not write a text ({self._reason(error)}).{_hint(error)}") from self._cause(error)
        choices = getattr(answer, "choices", None)
        if not choices or getattr(choices[0], "text", None) is None:
            raise self._error(f"gave an answer without a text ({self._reason(answer)}).{_V1}")
        read = getattr(answer.usage, "prompt_tokens", None)
        if read and read != len(prompt):
            more = " It may add a token at the beginning." if self.text_prompts else ""
            raise self._error(f"read {read} tokens of a prompt that has {len(prompt)}.{more}")
        return self._read(choices[0], ends)

    def _read(self, choice: Any, ends: Sequence[int]) -> EngineText:
        if choice.finish_reason not in _ENDED:
            raise self._error(
                f"ended a text because of {choice.finish_reason!r}, which is not one of {', '.join(_ENDED)}: it is "
                "not the text that the model writes."
            )
        finish, ids = _ENDED[choice.finish_reason], getattr(choice, "token_ids", None)
        if ids is None:
            own = tuple(self.tokenizer(choice.text, add_special_tokens=False).input_ids)
            return EngineText(own, finish, choice.text)
        written = cut(ids, ends)
        return written if written.finish == "stop" else replace(written, finish=finish)

    def _error(self, words: str) -> KernelSurgeryError:
        return KernelSurgeryError(f"{self.name!r} at {shown(self.base_url)} {words}")

    def _reason(self, said: object) -> str:
        """Return the first line of an error or of an answer, shortened and without the key."""
        from openai import APIConnectionError, APITimeoutError

        if isinstance(said, APITimeoutError):
            return f"no answer within {self.timeout_s:g} s"
        line = next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__).rstrip(".")
        if isinstance(said, APIConnectionError) and said.__cause__ is not None:
            line += f": {said.__cause__}" if str(said.__cause__) else f": {type(said.__cause__).__name__}"
        line = line.replace(self.key, "***") if self.key else line
        return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."

    def _cause(self, error: Exception) -> Exception | None:
        """Return the error that a traceback may show: a server may have repeated the key in its message."""
        return None if self.key and self.key in str(error) else error


_V1 = " Does the address end in /v1?"


def _hint(error: Exception) -> str:
    from openai import APIConnectionError

    if isinstance(error, APIConnectionError):
        return " Is the server running, and is this its address?"
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f" The environment variable {KEY} holds the key that is sent."
    return _V1 if status in (404, 405) or isinstance(error, (AttributeError, TypeError)) else ""


def as_text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """Return the text of which the tokenizer makes these ids, where it adds its own special tokens.

    Raises KernelSurgeryError if there is none.
    """
    for own in (list(ids), list(ids[1:])):  # the second without a BOS token, which the tokenizer adds
        text = str(tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if list(tokenizer(text).input_ids) == list(ids):
            return text
    raise KernelSurgeryError(
        "a prompt cannot be sent as text: the tokenizer makes other tokens of it. Leave out --text-prompts."
    )


def _finished(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
