"""Define the generator, which turns prompts into answers with the reason why each ended."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sft_lightning.errors import UserError
from sft_lightning.generation.decoding.stopping import StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        text: What the model wrote, up to and including the stop string, or up to and excluding EOS. Special tokens
            other than EOS are text like any other.
        num_tokens: How many tokens the model generated for it, the EOS included.
        stop_reason: What ended it: a stop string, EOS, or the limit on new tokens.
        mean_entropy: Mean over its tokens of the entropy of the distributions that they were chosen from, in nats;
            None if unknown. Equal answers may differ in it: batches of different shapes round differently.
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
        """Returns one answer for each prompt, in order. The model and the random state are unchanged afterwards.

        Args:
            model: The model; None for generators that ask a server.
            tokenizer: The tokenizer of the model.
            prompts: Complete prompts, without further rendering.
            numbers: For each prompt, which answer of the whole evaluation it is; None means 0, 1, 2, ... A sampled
                answer follows from it and the prompt, and not from the other prompts of the call.
        """


class SamplingGenerator(Generator):
    """A generator with the settings of sampling that every generator of this package has.

    Args:
        max_new_tokens: An answer is cut at this number of tokens.
        temperature: Divides the logits before sampling.
        top_p: Samples from the most likely tokens that hold this much of the probability. 1.0 is all of them.
        greedy: Takes the most likely token each time; temperature, top_p and seed are then ignored.
        stop_strings: An answer ends with the first of these that it contains.
        seed: Seed of the sampling.

    Raises:
        UserError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        greedy: bool,
        stop_strings: Sequence[str],
        seed: int,
    ) -> None:
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise UserError(f"stop_strings {stop_strings!r} must be a list of texts, none of them empty")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
        if not 1e-6 <= temperature < float("inf"):  # logits divided by less may overflow
            raise UserError(
                f"temperature {temperature} must be finite, at least 1e-6; for the most likely answer set greedy: true"
            )
        if not 0 < top_p <= 1:
            raise UserError(f"top_p {top_p} must be above 0 and at most 1")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.greedy = greedy
        self.stop_strings = tuple(stop_strings)
        self.seed = seed


def answer_numbers(prompts: Sequence[str], numbers: Sequence[int] | None) -> Sequence[int]:
    """Returns the ``numbers`` of :meth:`Generator.generate`, counted from 0 where they are None."""
    if numbers is None:
        return range(len(prompts))
    assert len(numbers) == len(prompts)
    return numbers
