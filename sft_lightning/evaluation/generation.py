"""Generators: prompts in, the model's answers and why each of them ended out."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from sft_lightning.data.tokenization import encode_prompts, pad_token_id
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

StopReason = Literal["stop_string", "eos", "length"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        text: What the model wrote, up to and including the stop string, or up to and without EOS. Special tokens other
            than EOS are text like any other.
        num_tokens: How many tokens the model took for it, the EOS included.
        stop_reason: What ended it: a stop string, EOS, or the limit on new tokens.
        mean_entropy: Of the distributions that its tokens were chosen from, in nats; None where it is not known.
    """

    text: str
    num_tokens: int
    stop_reason: StopReason
    mean_entropy: float | None = None


class Generator(ABC):
    """Answers prompts with a model."""

    @abstractmethod
    def generate(
        self,
        model: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        prompts: Sequence[str],
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Returns one answer for each prompt, in order, and leaves the model and the random state as they were.

        Args:
            model: The model; generators that ask a server do without.
            tokenizer: The model's.
            prompts: Given to the model as they are.
            numbers: For each prompt, which answer of the whole evaluation it is; None: 0, 1, 2, ... A sampled answer
                follows from it and the prompt, whatever else is asked for in the same call.
        """


class TransformersGenerator(Generator):
    """Generates with transformers' own ``generate``, in batches of prompts of similar length.

    A model's own sampling settings (its ``generation_config``) play no part, except for its EOS tokens: an answer ends
    at any of those or at the tokenizer's.

    Args:
        max_new_tokens: An answer is cut at this many tokens.
        temperature: Divides the logits before sampling.
        top_p: Samples from the most likely tokens that hold this much of the probability. 1.0 is all of them.
        greedy: Takes the most likely token each time; temperature, top_p and seed then play no part.
        stop_strings: An answer ends with the first of these that it contains, wherever token borders fall.
        batch_tokens: Most tokens of a batch: rows x (longest prompt + max_new_tokens). A batch has at least one row.
        seed: Sampling with the same seed, prompts and settings gives the same answers.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        top_p: float = 1.0,
        greedy: bool = False,
        stop_strings: Sequence[str] = ("</answer>",),
        batch_tokens: int = 65536,
        seed: int = 0,
    ) -> None:
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise UserError(f"stop_strings {stop_strings!r} must be a list of texts, none of them empty")
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature {temperature} must be above 0; for the most likely answer set greedy: true")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p} must be above 0 and at most 1")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.greedy = greedy
        self.stop_strings = tuple(stop_strings)
        self.batch_tokens = batch_tokens
        self.seed = seed

    def generate(
        self,
        model: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        prompts: Sequence[str],
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Returns one answer for each prompt, in order, and leaves the model and the random state as they were.

        Raises:
            UserError: If a prompt has no tokens.
        """
        assert model is not None
        assert tokenizer is not None
        rows = encode_prompts(tokenizer, prompts)
        for index, row in enumerate(rows):
            if not row:
                raise UserError(f"prompt {index} is empty; a model needs at least one token to answer")
        generations: dict[int, Generation] = {}
        config = self._generation_config(model, tokenizer)
        # The layers of a model in training may be compiled: its cache would make them compile again and again.
        as_written = torch.compiler.set_stance("force_eager")
        with (
            as_written,
            _evaluation_mode(model),
            _generation_config_of(model, config),
            _seeded(self.seed, model.device),
        ):
            for batch in self._batches(rows):
                answers = self._generate_batch(model, tokenizer, [rows[index] for index in batch])
                generations.update(zip(batch, answers, strict=True))
                logger.info("generated %d of %d answers", len(generations), len(rows))
        return [generations[index] for index in range(len(rows))]

    def _generation_config(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> GenerationConfig:
        own_eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = {tokenizer.eos_token_id, *(own_eos if isinstance(own_eos, list) else [own_eos])} - {None}
        sampling: dict[str, Any] = (
            {} if self.greedy else {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        )
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=not self.greedy,
            use_cache=True,  # training configs have it off
            eos_token_id=sorted(eos) or None,
            pad_token_id=pad_token_id(tokenizer),
            **sampling,
        )

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Yields row numbers, longest prompts first: what does not fit into memory fails at once."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        while order:
            size = max(1, self.batch_tokens // (len(rows[order[0]]) + self.max_new_tokens))
            yield order[:size]
            order = order[size:]

    def _generate_batch(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]]
    ) -> list[Generation]:
        config = model.generation_config
        width = max(map(len, rows))
        input_ids = torch.full((len(rows), width), config.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, width - len(row) :] = torch.tensor(row)
            attention_mask[index, width - len(row) :] = 1
        watch = _AnswerWatch(tokenizer, self.stop_strings, config.eos_token_id or [], width)
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return watch.generations(output)


class _AnswerWatch(StoppingCriteria):
    """Notes when and why each row of a batch ends. Prompts are not looked at: they may spell the stop string."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop_strings: tuple[str, ...],
        eos_token_ids: list[int],
        prompt_width: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._eos_token_ids = set(eos_token_ids)
        self._prompt_width = prompt_width
        # A token is at least one byte. The few more are for what a decoder does at the front of a text.
        self._window = max((len(stop.encode()) for stop in stop_strings), default=0) + 8
        self._ended: dict[int, tuple[StopReason, int]] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        num_new_tokens = input_ids.shape[1] - self._prompt_width
        tails = input_ids[:, -min(self._window, num_new_tokens) :].tolist()
        for row, tail in enumerate(tails):
            if row in self._ended:
                continue
            if self._stop_strings and self._cut(self._decode(tail)) is not None:
                self._ended[row] = ("stop_string", num_new_tokens)
            elif tail[-1] in self._eos_token_ids:
                self._ended[row] = ("eos", num_new_tokens)
        return torch.tensor([row in self._ended for row in range(len(tails))], device=input_ids.device)

    def generations(self, output: Tensor) -> list[Generation]:
        """Returns the answers in ``output``, prompts and new tokens, shape [B, T], int64."""
        answers = output[:, self._prompt_width :].tolist()
        return [self._generation(row, tokens) for row, tokens in enumerate(answers)]

    def _generation(self, row: int, tokens: list[int]) -> Generation:
        stop_reason, num_tokens = self._ended.get(row, ("length", len(tokens)))
        text = self._decode(tokens[: num_tokens - (stop_reason == "eos")])
        if stop_reason == "stop_string":
            text = text[: self._cut(text)]
        return Generation(text=text, num_tokens=num_tokens, stop_reason=stop_reason)

    def _cut(self, text: str) -> int | None:
        """Returns where the first stop string ends, or None where there is none."""
        ends = [text.index(stop) + len(stop) for stop in self._stop_strings if stop in text]
        return min(ends, default=None)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


@contextmanager
def _evaluation_mode(model: "PreTrainedModel") -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(): parts of it may have been frozen in evaluation mode
            module.training = True


@contextmanager
def _generation_config_of(model: "PreTrainedModel", config: GenerationConfig) -> Iterator[None]:
    """Puts ``config`` in the place of the model's own, from which ``generate`` fills in whatever a call leaves open."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
