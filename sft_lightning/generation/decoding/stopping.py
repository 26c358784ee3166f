"""When an answer ends: a stop string in its text, an EOS token, or the limit on new tokens."""

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
    """Tells from the tokens of an answer whether the last one ended it, and what its text is.

    Only answers are looked at: a prompt may spell the stop string.

    Args:
        tokenizer: Makes text of tokens.
        stop_strings: The first of these to be complete ends an answer, wherever token borders fall.
        eos_token_ids: Any of these ends it too.
        max_new_tokens: As does this length.
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
        # A token is at least one byte. The few more are for what a decoder does at the front of a text.
        self._window = max((len(stop.encode()) for stop in stop_strings), default=0) + 8
        self._can_end: dict[int, bool] = {}

    def reason(self, tokens: list[int]) -> StopReason | None:
        """Returns why the answer ends with the last of its tokens, None if it goes on."""
        last = tokens[-1]
        can_end = self._can_end.get(last)
        if can_end is None:
            can_end = self._can_end[last] = last in self._eos_token_ids or self._may_complete_a_stop_string(last)
        if can_end:
            # Decoding takes longer than all the rest: only behind the few tokens that can be the last of a stop string.
            if cut_at_stop_string(self._decode(tokens[-self._window :]), self._stop_strings) is not None:
                return "stop_string"
            if last in self._eos_token_ids:
                return "eos"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def text(self, tokens: list[int], reason: StopReason) -> str:
        """Returns the text of an answer that ended: up to and with its stop string, or up to and without EOS."""
        text = self._decode(tokens[:-1] if reason == "eos" else tokens)
        stopped = cut_at_stop_string(text, self._stop_strings) if reason == "stop_string" else None
        return text if stopped is None else stopped

    def _may_complete_a_stop_string(self, token: int) -> bool:
        """Returns whether a stop string may end inside the token's text, as far as that is known without those before.

        A decoder may drop a space at the front of a text, so the token is looked at behind another one, too. A part of
        a letter decodes to the replacement character.
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
    """Returns whether the text holds the stop string or begins with a part that stands at the end of it."""
    return stop in text or any(stop.endswith(text[:length]) for length in range(1, len(text) + 1))
