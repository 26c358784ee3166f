"""Decide when an answer ends: at a stop string, an EOS token, or the limit on new tokens."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

StopReason = Literal["stop_string", "eos", "length"]


def cut_at_stop_string(text: str, stop_strings: Collection[str]) -> str | None:
    """Returns a text up to and including the stop string that ends first, or None if it contains none."""
    ends = [text.index(stop) + len(stop) for stop in stop_strings if stop in text]
    return text[: min(ends)] if ends else None


class StopCondition:
    """Decides from the tokens of an answer whether the last one ended it, and returns its text.

    Prompts do not count: a prompt may contain a stop string.

    Args:
        tokenizer: Decodes tokens.
        stop_strings: The first complete one ends an answer, regardless of token boundaries.
        eos_token_ids: Each of these ends an answer.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stop_strings: Sequence[str],
        eos_token_ids: Collection[int],
        max_new_tokens: int,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._eos_token_ids = frozenset(eos_token_ids)
        # A token is at least one byte. A few more tokens allow for decoders that change the front of a text.
        self._window = max((len(stop.encode()) for stop in stop_strings), default=0) + 8
        self._can_end: dict[int, bool] = {}

    def reason(self, tokens: list[int]) -> StopReason | None:
        """Returns why the answer ends with its last token, or None if it continues."""
        last = tokens[-1]
        can_end = self._can_end.get(last)
        if can_end is None:
            can_end = self._can_end[last] = last in self._eos_token_ids or self._may_complete_a_stop_string(last)
        if can_end:
            # Decoding is the slowest part: only after the few tokens that can complete a stop string.
            if cut_at_stop_string(self._decode(tokens[-self._window :]), self._stop_strings) is not None:
                return "stop_string"
            if last in self._eos_token_ids:
                return "eos"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def text(self, tokens: list[int], reason: StopReason) -> str:
        """Returns the text of a finished answer, up to and including its stop string, or without its EOS."""
        text = self._decode(tokens[:-1] if reason == "eos" else tokens)
        stopped = cut_at_stop_string(text, self._stop_strings) if reason == "stop_string" else None
        return text if stopped is None else stopped

    def _may_complete_a_stop_string(self, token: int) -> bool:
        """Returns whether a stop string may end inside the text of a token, after any preceding text.

        A decoder may drop a space at the front of a text, so the token is also decoded after another one. A part of a
        character decodes to the replacement character.
        """
        alone, twice = self._decode([token]), self._decode([token, token])
        texts = [alone, twice.removeprefix(alone)]
        if "\ufffd" in twice or not twice.startswith(alone):
            return True
        return any(stop[-1].isspace() or _ends_inside(stop, text) for stop in self._stop_strings for text in texts)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _ends_inside(stop: str, text: str) -> bool:
    """Returns whether the text contains the stop string or begins with an ending of it."""
    return stop in text or any(stop.endswith(text[:length]) for length in range(1, len(text) + 1))
