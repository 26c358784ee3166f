"""Draw a few rows of a set and split them into tokens for display."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_lightning.data.batch import Example
from sft_lightning.data.token_store import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUM_SAMPLES = 5
# The most tokens shown of a prompt or a response; of a longer one, half of them from each end.
_MOST_TOKENS = 120


@dataclass(frozen=True, slots=True)
class Pieces:
    """Texts of a sequence of tokens, possibly without its middle.

    Attributes:
        head: Texts of the first tokens. Tokens that form one character together are one text.
        num_left_out: The number of tokens between head and tail.
        tail: Texts of the last tokens; empty if no tokens are omitted.
    """

    head: list[str]
    num_left_out: int
    tail: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns the pieces as they are written to JSON."""
        return {"head": self.head, "num_tokens_left_out": self.num_left_out, "tail": self.tail}


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as the model is trained on it, by the last label span of its last sequence.

    Attributes:
        prompt: Tokens before the span.
        response: Tokens of the span, without the EOS at the end.
        eos: Text of the supervised EOS at the end; None if there is none.
    """

    source: str
    num_prompt_tokens: int
    num_response_tokens: int
    prompt: Pieces
    response: Pieces
    eos: str | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the sample as it is written to JSON."""
        return {
            "source": self.source,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_response_tokens": self.num_response_tokens,
            "prompt": self.prompt.as_dict(),
            "response": self.response.as_dict(),
            "eos": self.eos,
        }


def draw_samples(rows: TokenStore, tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[Sample]:
    """Returns at most five rows, in file order: the same ones for the same seed."""
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(_NUM_SAMPLES, len(rows))))
    return [_sample(rows[index], tokenizer) for index in chosen]


def _sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Sample:
    sequence = example.sequences[-1]
    prompt, response = sequence.prefix.tolist(), sequence.tokens[len(sequence.prefix) :].tolist()
    has_eos = response[-1] == tokenizer.eos_token_id
    return Sample(
        source=example.source,
        num_prompt_tokens=len(prompt),
        num_response_tokens=len(response),
        prompt=_pieces(prompt, tokenizer),
        response=_pieces(response[:-1] if has_eos else response, tokenizer),
        eos=str(tokenizer.eos_token) if has_eos else None,
    )


def _pieces(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> Pieces:
    if len(tokens) <= _MOST_TOKENS:
        return Pieces(_texts(tokens, tokenizer), 0, [])
    half = _MOST_TOKENS // 2
    return Pieces(
        _texts(tokens[:half], tokenizer), len(tokens) - 2 * half, _texts(tokens[-half:], tokenizer, tokens[-half - 1])
    )


def _texts(tokens: list[int], tokenizer: "PreTrainedTokenizerBase", before: int | None = None) -> list[str]:
    """Returns the text of each token in context, because some tokenizers drop a space before the first token."""
    context = [] if before is None else [before]

    def decode(number: int) -> str:
        ids = context + tokens[:number]
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""

    texts, done = [], decode(0)
    for number in range(1, len(tokens) + 1):
        text = decode(number)
        if text.endswith("\ufffd") and number < len(tokens):
            continue  # the token ends within a character
        texts.append(text[len(done) :])
        done = text
    return texts
