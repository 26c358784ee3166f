"""Generators: prompts in, the model's answers and why each of them ended out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sft_lightning.data.tokenization import encode_prompts, pad_token_id
from sft_lightning.distributed.fsdp import is_sharded
from sft_lightning.errors import UserError
from sft_lightning.generation.decoding.batching import answer_in_batches
from sft_lightning.generation.decoding.fsdp_sync import synchronize_forwards
from sft_lightning.generation.decoding.hf_generate import HFGenerate
from sft_lightning.generation.decoding.loop import DecodingLoop, can_decode
from sft_lightning.generation.decoding.sampling import TokenSampler
from sft_lightning.generation.decoding.stopping import StopCondition, StopReason
from sft_lightning.system.sdpa import without_cudnn_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        text: What the model wrote, up to and including the stop string, or up to and without EOS. Special tokens other
            than EOS are text like any other.
        num_tokens: How many tokens the model took for it, the EOS included.
        stop_reason: What ended it: a stop string, EOS, or the limit on new tokens.
        mean_entropy: Of the distributions that its tokens were chosen from, in nats; None where it is not known. Equal
            answers may differ in it: it is rounded differently in batches of another shape.
    """

    text: str
    num_tokens: int
    stop_reason: StopReason
    mean_entropy: float | None = field(default=None, compare=False)


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


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, stop_strings: Sequence[str]) -> None:
    """Raises UserError where a setting that every generator has is out of its range."""
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise UserError(f"stop_strings {stop_strings!r} must be a list of texts, none of them empty")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature} must be above 0; for the most likely answer set greedy: true")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} must be above 0 and at most 1")


class TransformersGenerator(Generator):
    """Generates with a model in this process, in batches of prompts of similar length.

    What all prompts begin with is computed once. Where memory does not suffice, batches get smaller.

    A model's own sampling settings (its ``generation_config``) play no part, except for its EOS tokens: an answer ends
    at any of those or at the tokenizer's.

    All processes that share a sharded model's weights must call it, each with prompts of its own or none.

    Args:
        max_new_tokens: An answer is cut at this many tokens.
        temperature: Divides the logits before sampling.
        top_p: Samples from the most likely tokens that hold this much of the probability. 1.0 is all of them.
        greedy: Takes the most likely token each time; temperature, top_p and seed then play no part.
        stop_strings: An answer ends with the first of these that it contains, wherever token borders fall.
        batch_tokens: Most tokens of a batch: rows x (longest prompt + max_new_tokens). A batch has at least one row.
        seed: An answer that is sampled follows from this, its number, its prompt and the settings.

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
        check_sampling(max_new_tokens, temperature, top_p, stop_strings)
        if batch_tokens < 1:
            raise UserError(f"batch_tokens {batch_tokens} must be at least 1")
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

        The mean entropy of an answer is that of the model's distributions at the sampling temperature (1 if greedy),
        before ``top_p``.

        Raises:
            UserError: If a prompt has no tokens.
        """
        assert model is not None
        assert tokenizer is not None
        numbers = range(len(prompts)) if numbers is None else numbers
        assert len(numbers) == len(prompts)
        # The layers of a model in training may be compiled: its cache would make them compile again and again.
        as_written = torch.compiler.set_stance("force_eager")
        any_shape = without_cudnn_attention(is_cuda=model.device.type == "cuda")
        with (
            as_written,
            any_shape,
            _evaluation_mode(model),
            _random_state_kept(model.device),
            synchronize_forwards(model),
        ):
            rows = encode_prompts(tokenizer, prompts)
            for index, row in enumerate(rows):
                if not row:
                    raise UserError(f"prompt {index} is empty; a model needs at least one token to answer")
            return self._answer(model, tokenizer, rows, numbers) if rows else []

    def _answer(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: list[list[int]],
        numbers: Sequence[int],
    ) -> list[Generation]:
        eos_token_ids = _eos_token_ids(model, tokenizer)
        padding = pad_token_id(tokenizer)
        end = StopCondition(
            tokenizer,
            stop_strings=self.stop_strings,
            eos_token_ids=eos_token_ids,
            max_new_tokens=self.max_new_tokens,
        )
        choice = TokenSampler(greedy=self.greedy, temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        decoder: DecodingLoop | HFGenerate
        if can_decode(model):
            decoder = DecodingLoop(model, rows, choice, end, padding)
        else:
            decoder = HFGenerate(model, choice, end, eos_token_ids, padding)
        answers = answer_in_batches(
            rows,
            lambda batch: decoder.answer([rows[index] for index in batch], [numbers[index] for index in batch]),
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            may_retry=not is_sharded(model),  # the others would be in the middle of a forward pass
        )
        return [
            Generation(
                end.text(answer.tokens, answer.stop_reason), len(answer.tokens), answer.stop_reason, answer.mean_entropy
            )
            for answer in answers
        ]


def _eos_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    own = model.generation_config.eos_token_id if model.generation_config else None
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


@contextmanager
def _evaluation_mode(model: "PreTrainedModel") -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:  # not model.train(): parts of it may have been frozen in evaluation mode
            module.training = True


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A model's own code may draw random numbers."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
