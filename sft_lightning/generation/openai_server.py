"""Generate answers with a server of the OpenAI protocol: vLLM, SGLang or ``transformers serve``."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_lightning.errors import UserError
from sft_lightning.generation.base import Generation, SamplingGenerator, answer_numbers
from sft_lightning.generation.decoding.stopping import cut_at_stop_string
from sft_lightning.generation.server_client import ServerClient, TemporaryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Fields that options of the generator set, and fields that change the kind of answer.
_OWN_FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed"}
_OTHER_ANSWERS = {"n", "best_of", "echo", "stream", "suffix"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_NUM_PROBE_TOKENS = 4
_MAX_TOKENS = 2**31
_MAX_PROBED_PROMPTS = 4


class OpenAIServerGenerator(SamplingGenerator):
    """Generates with the model of a server, through its ``/completions``: one request for each prompt.

    The answers are those of the model that the server has loaded, and not of a model in training here.

    Prompts are sent unchanged, without a chat template. The server decides about the ``generation_config`` of its
    model, special tokens in the text, and whether equal seeds give equal answers. Two of its defaults change what is
    measured; correct them with ``extra_fields``: vLLM takes ``top_k`` and other settings from the model (unless started
    with ``--generation-config vllm``), and ``transformers serve`` is greedy at every temperature unless the
    ``generation_config`` of the model, or the field of that name, sets ``do_sample``.

    If a server does not show, by name or in the text, whether a stop string ended an answer, none is sent: the answer
    is cut here, and ``num_tokens`` also counts the tokens after the stop string.

    Args:
        base_url: Address of the server: http://127.0.0.1:8000/v1.
        model: Name of the model on the server. None takes the only one that it lists.
        max_new_tokens: An answer is cut at this number of tokens.
        temperature: Divides the logits before sampling.
        top_p: Samples from the most likely tokens that hold this much of the probability. 1.0 is all of them.
        greedy: Takes the most likely token each time; temperature, top_p and seed are then ignored.
        stop_strings: An answer ends with the first of these that it contains.
        seed: Each answer is sampled with a seed derived from this one and the number of the answer.
        num_concurrent: Maximum number of requests in flight.
        num_retries: How often a request is sent again if the server fails, is busy or cannot be reached.
        timeout_seconds: Time limit of an answer.
        api_key_variable: Environment variable that holds the server's key. None sends no key.
        extra_fields: Further fields of every request, as the server names them: ``{top_k: -1}`` for vLLM.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        stop_strings: Sequence[str] = ("</answer>",),
        seed: int = 0,
        num_concurrent: int = 32,
        num_retries: int = 5,
        timeout_seconds: float = 600.0,
        api_key_variable: str | None = None,
        extra_fields: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            greedy=greedy,
            stop_strings=stop_strings,
            seed=seed,
        )
        for name, value, least in (("num_concurrent", num_concurrent, 1), ("num_retries", num_retries, 0)):
            if value < least:
                raise UserError(f"{name} {value} must be at least {least}")
        if not 0 < timeout_seconds < float("inf"):
            raise UserError(f"timeout_seconds {timeout_seconds} must be above 0")
        refused = sorted((_OWN_FIELDS | _OTHER_ANSWERS).intersection(extra_fields or {}))
        if refused:
            raise UserError(f"extra_fields must not hold {', '.join(refused)}; the generator sets these itself")
        self.base_url = base_url
        self.model = model
        self.num_concurrent = num_concurrent
        self.num_retries = num_retries
        self.timeout_seconds = timeout_seconds
        self.api_key_variable = api_key_variable
        self.extra_fields = dict(extra_fields or {})
        self._client()  # so that a wrong address fails now and not after an hour of training

    def generate(
        self,
        model: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        prompts: Sequence[str],
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Returns one answer for each prompt, in order.

        Args:
            model: Ignored: the server has its own. May be None.
            tokenizer: Ignored.
            prompts: Sent unchanged.
            numbers: Which answer of the whole evaluation each one is; None counts from 0. Seeds are derived from it.

        Raises:
            UserError: If the server refuses a prompt, or cannot be reached.
        """
        numbers = answer_numbers(prompts, numbers)
        if not prompts:
            return []
        client = self._client()
        name = self.model if self.model is not None else self._only_model(client)
        settings = {"model": name, "max_tokens": self.max_new_tokens, **self._sampling(), **self.extra_fields}
        if self.stop_strings and _stop_strings_can_be_sent(client, settings, prompts):
            settings["stop"] = list(self.stop_strings)
        generations: dict[int, Generation] = {}
        report_every = max(self.num_concurrent, len(prompts) // 20)
        executor = ThreadPoolExecutor(self.num_concurrent, thread_name_prefix="server-request")
        try:
            indices = {
                executor.submit(self._answer, client, settings, prompt, number): index
                for index, (prompt, number) in enumerate(zip(prompts, numbers, strict=True))
            }
            for future in as_completed(indices):
                generations[indices[future]] = _result(future, indices[future])
                if len(generations) % report_every == 0 or len(generations) == len(prompts):
                    logger.info("generated %d of %d answers", len(generations), len(prompts))
        finally:
            # After Ctrl-C or an error, end the threads here and the work of the server.
            client.stop()
            executor.shutdown(cancel_futures=True)
        return [generations[index] for index in range(len(prompts))]

    def _client(self) -> ServerClient:
        return ServerClient(self.base_url, self._api_key(), self.num_retries, self.timeout_seconds)

    def _api_key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key:
            raise UserError(f"api_key_variable: the environment variable {self.api_key_variable} is not set")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"api_key_variable: {self.api_key_variable} holds characters that no key has")
        return key

    def _only_model(self, client: ServerClient) -> str:
        try:
            names = client.ask("/models", None, _read_models)
        except UserError as error:
            raise UserError(f"model is not given, and {error}") from None
        if len(names) != 1:
            listed = ", ".join(names[:20]) or "none"
            raise UserError(f"{self.base_url} lists {len(names)} models ({listed}); choose one with model")
        return names[0]

    def _sampling(self) -> dict[str, float]:
        if self.greedy:
            return {"temperature": 0.0, "top_p": 1.0}
        return {"temperature": self.temperature, "top_p": self.top_p}

    def _answer(self, client: ServerClient, settings: Mapping[str, Any], prompt: str, number: int) -> Generation:
        seed = {} if self.greedy else {"seed": _request_seed(self.seed, number)}
        completion = client.ask("/completions", {**settings, "prompt": prompt, **seed}, _read_completion)
        text = completion.text
        if completion.stop_string in self.stop_strings and completion.stop_string not in text:
            text += completion.stop_string
        stopped = cut_at_stop_string(text, self.stop_strings)
        if stopped is not None:
            return Generation(stopped, completion.num_tokens, "stop_string")
        return Generation(text, completion.num_tokens, "length" if completion.is_cut else "eos")


@dataclass(frozen=True, slots=True)
class _Completion:
    """The answer of a server.

    Attributes:
        text: With or without the stop string that ended it.
        is_cut: Whether the limit on tokens ended it.
        num_tokens: Count of the server.
        stop_string: The stop string that ended it, if the server names it.
    """

    text: str
    is_cut: bool
    num_tokens: int
    stop_string: str | None


def _stop_strings_can_be_sent(client: ServerClient, settings: Mapping[str, Any], prompts: Sequence[str]) -> bool:
    """Returns whether an answer shows that a stop string ended it.

    In the protocol the string is cut off, and the finish reason is the same as for EOS, but a right format depends on
    the difference. vLLM (``stop_reason``) and SGLang (``matched_stop``) name the string; ``transformers serve`` keeps
    it in the text. A short answer, repeated with its own beginning as a stop string, shows how this server behaves.
    """
    for prompt in prompts[:_MAX_PROBED_PROMPTS]:
        probe = {**settings, "prompt": prompt, "temperature": 0.0, "max_tokens": _NUM_PROBE_TOKENS}
        answer = client.ask("/completions", probe, _read_completion)
        # A replacement character is an incomplete character, which a server would not find.
        beginning = answer.text.partition("\ufffd")[0]
        if beginning:
            stopped = client.ask("/completions", {**probe, "stop": [beginning]}, _read_completion)
            if stopped.stop_string == beginning or beginning in stopped.text:
                return True
            break
    logger.info("this server does not show which stop string ended an answer: answers are cut here")
    return False


def _read_completion(data: Any) -> _Completion:
    try:
        choice = data["choices"][0]
        text, finish_reason, num_tokens = choice["text"], choice["finish_reason"], data["usage"]["completion_tokens"]
        # A number there is the id of an EOS token.
        named = [value for key in ("stop_reason", "matched_stop") if isinstance(value := choice.get(key), str)]
    except (LookupError, TypeError, AttributeError) as error:
        raise TemporaryError(f"no completion: {type(error).__name__} {error}") from None
    if not isinstance(text, str):
        raise TemporaryError(f"no completion: its text is {type(text).__name__}")
    if type(num_tokens) is not int or not 0 <= num_tokens < _MAX_TOKENS:
        raise TemporaryError("no completion: usage.completion_tokens is not a count")
    if finish_reason not in ("stop", "length"):
        raise TemporaryError(f"no completion: its finish_reason is {str(finish_reason)[:40]!r}")
    return _Completion(
        text=_LONE_SURROGATE.sub("\ufffd", text),
        is_cut=finish_reason == "length",
        num_tokens=num_tokens,
        stop_string=named[0] if named else None,
    )


def _read_models(data: Any) -> list[str]:
    try:
        return [str(entry["id"]) for entry in data["data"]]
    except (LookupError, TypeError) as error:
        raise TemporaryError(f"no list of models: {type(error).__name__} {error}") from None


def _result(future: Any, index: int) -> Generation:
    try:
        generation: Generation = future.result()
    except UserError as error:
        raise UserError(f"prompt {index}: {error}") from None
    return generation


def _request_seed(seed: int, number: int) -> int:
    """Returns a seed of 31 bits, which every server accepts, equal on every machine."""
    digest = hashlib.sha256(f"{seed},{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
