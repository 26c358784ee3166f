"""Generate answers with a model in this process."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from math import isnan
from typing import TYPE_CHECKING

import torch

from sft_lightning.data.tokenization import encode_prompts, pad_token_id
from sft_lightning.distributed.fsdp import is_sharded
from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.generation.base import Generation, SamplingGenerator, answer_numbers
from sft_lightning.generation.decoding.batching import answer_in_batches
from sft_lightning.generation.decoding.fsdp_sync import synchronize_forwards
from sft_lightning.generation.decoding.hf_generate import HFGenerate
from sft_lightning.generation.decoding.loop import DecodingLoop, decoding_obstacle
from sft_lightning.generation.decoding.sampling import TokenSampler
from sft_lightning.generation.decoding.stopping import StopCondition
from sft_lightning.system.sdpa import without_cudnn_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class TransformersGenerator(SamplingGenerator):
    """Generates with a model in this process, in batches of prompts of similar length.

    The common prefix of all prompts is computed once. If a batch runs out of memory, later ones are smaller.

    The sampling settings of the model (its ``generation_config``) are ignored, except for its EOS tokens: an answer
    ends at any of those or at the one of the tokenizer.

    All processes that hold shards of a model must call it, each with different prompts or none.

    Args:
        max_new_tokens: An answer is cut at this number of tokens.
        temperature: Divides the logits before sampling.
        top_p: Samples from the most likely tokens that hold this much of the probability. 1.0 is all of them.
        greedy: Takes the most likely token each time; temperature, top_p and seed are then ignored.
        stop_strings: An answer ends with the first of these that it contains, regardless of token boundaries.
        batch_tokens: Maximum tokens of a batch: rows x (longest prompt + max_new_tokens). A batch has at least one row.
        seed: A sampled answer follows from this, its number, its prompt and the settings.

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
        super().__init__(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            greedy=greedy,
            stop_strings=stop_strings,
            seed=seed,
        )
        if batch_tokens < 1:
            raise UserError(f"batch_tokens {batch_tokens} must be at least 1")
        self.batch_tokens = batch_tokens

    def generate(
        self,
        model: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerBase | None",
        prompts: Sequence[str],
        *,
        numbers: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Returns one answer for each prompt, in order. The model and the random state are unchanged afterwards.

        The mean entropy of an answer is that of the model's distributions at the sampling temperature (1 if greedy),
        before ``top_p``.

        Raises:
            UserError: If a prompt has no tokens.
            RunFailedError: If logits are NaN or infinite.
        """
        assert model is not None
        assert tokenizer is not None
        numbers = answer_numbers(prompts, numbers)
        # The layers of a model in training may be compiled: a growing cache would recompile them again and again.
        eager = torch.compiler.set_stance("force_eager")
        any_shape = without_cudnn_attention(is_cuda=model.device.type == "cuda")
        with (
            eager,
            any_shape,
            _evaluation_mode(model),
            _preserved_random_state(model.device),
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
        stop_condition = StopCondition(
            tokenizer,
            stop_strings=self.stop_strings,
            eos_token_ids=eos_token_ids,
            max_new_tokens=self.max_new_tokens,
        )
        sampler = TokenSampler(greedy=self.greedy, temperature=self.temperature, top_p=self.top_p, seed=self.seed)
        decoder: DecodingLoop | HFGenerate
        obstacle = decoding_obstacle(model)
        if obstacle is None:
            decoder = DecodingLoop(model, rows, sampler, stop_condition, padding)
        else:
            _warn_once(
                f"generation: {type(model).__name__} uses `generate` of transformers, which takes longer than the "
                f"decoding loop of this package, because {obstacle}"
            )
            decoder = HFGenerate(model, sampler, stop_condition, eos_token_ids, padding)
        answers = answer_in_batches(
            rows,
            lambda batch: decoder.answer([rows[index] for index in batch], [numbers[index] for index in batch]),
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            may_retry=not is_sharded(model),  # the other processes would be in the middle of a forward pass
        )
        if any(isnan(answer.mean_entropy or 0.0) for answer in answers):
            raise RunFailedError(
                "the model cannot answer: its logits are NaN or infinite, because its weights are or its activations "
                "overflow"
            )
        return [
            Generation(
                stop_condition.text(answer.tokens, answer.stop_reason),
                len(answer.tokens),
                answer.stop_reason,
                answer.mean_entropy,
            )
            for answer in answers
        ]


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


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


def _preserved_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Restores the random state afterwards: the code of a model may draw random numbers."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
