"""Check BOS and EOS tokens, and whether prompt and response would merge if tokenized as one text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sft_lightning.data.tokenization import encode_prompts, encode_responses
from sft_lightning.diagnostics.check.findings import Finding, Place, counted
from sft_lightning.diagnostics.check.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A merge shows in the characters next to the boundary: only rows where these merge are tokenized as a whole.
_NEAR_CHARACTERS = 32
# If more than this share of the rows merges, the cause is the template and not single words.
_SYSTEMATIC = 0.5
_MOST_REMEMBERED = 100_000


class TokenBoundaries:
    """Collects findings about the tokens at the ends of prompts and responses.

    Args:
        set_name: ``train`` or ``val``.
        tokenizer: The tokenizer that made the tokens.
    """

    def __init__(self, set_name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._set_name = set_name
        self._tokenizer = tokenizer
        self.num_rows = 0
        self.num_eos_supervised = 0
        self._without_eos: list[Place] = []
        self._inner_eos: list[Place] = []
        self._double_bos: list[Place] = []
        self._merging: list[Place] = []
        self._first_merge: tuple[str, str] | None = None
        self._meets: dict[tuple[str, str], bool] = {}

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, in file order."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        for record, example in rows:
            tokens, start = example.tokens, example.prompt_length
            self.num_rows += 1
            if tokens[-1] == eos:
                self.num_eos_supervised += 1
            else:
                self._without_eos.append(Place(record.source))
            if eos is not None and np.count_nonzero(tokens[start:-1] == eos):
                self._inner_eos.append(Place(record.source))
            if bos is not None and tokens[0] == bos and (tokens[1] == bos or (bos != eos and tokens[start] == bos)):
                self._double_bos.append(Place(record.source))
        self._look_for_merges(rows)

    def findings(self, *, append_eos: bool) -> list[Finding]:
        """Returns the findings.

        Args:
            append_eos: ``data.append_eos``.
        """
        name, findings = self._set_name, []
        if count := len(self._without_eos):
            none = self.num_eos_supervised == 0
            hint = "set data.append_eos: true" if not append_eos else "the tokenizer's EOS is not what ends the rows"
            findings.append(
                Finding(
                    "eos_not_supervised",
                    "error" if none else "warning",
                    f"{name}: {'no row ends' if none else counted(count, 'row does not end', 'rows do not end')} with "
                    "a supervised EOS" + (", so the model does not learn to stop" if none else ""),
                    hint,
                    count,
                    self._without_eos,
                )
            )
        if count := len(self._inner_eos):
            message = f"{name}: {counted(count, 'response holds', 'responses hold')} EOS before the end"
            fix = "remove its text: generation stops at the first one"
            findings.append(Finding("inner_eos", "warning", message, fix, count, self._inner_eos))
        if count := len(self._double_bos):
            message = f"{name}: {counted(count, 'row has', 'rows have')} two BOS, one from the data and one from the "
            message += "tokenizer"
            fix = "remove its text from prompts and responses"
            findings.append(Finding("double_bos", "error", message, fix, count, self._double_bos))
        return findings + self._merge_finding()

    def _merge_finding(self) -> list[Finding]:
        if self._first_merge is None:
            return []
        apart, joint = self._first_merge
        return [
            Finding(
                "merging_border",
                "warning" if len(self._merging) > _SYSTEMATIC * self.num_rows else "info",
                f"{self._set_name}: in {counted(len(self._merging), 'row')} of {self.num_rows:,} prompt and response "
                f"would merge if tokenized as one text, e.g. {apart} into {joint}; generation sees them "
                "apart, as training does",
                "end prompts without white space and begin responses with it",
                len(self._merging),
                self._merging,
            )
        ]

    def _look_for_merges(self, rows: Sequence[Row]) -> None:
        near = [(row.record.prompt[-_NEAR_CHARACTERS:], row.record.response[:_NEAR_CHARACTERS]) for row in rows]
        if len(self._meets) > _MOST_REMEMBERED:
            self._meets.clear()
        new = [pair for pair in dict.fromkeys(near) if pair not in self._meets]
        self._meets.update(zip(new, (merge is not None for merge in self._merged(new)), strict=True))
        merging = [row for row, pair in zip(rows, near, strict=True) if self._meets[pair]]
        texts = [(row.record.prompt, row.record.response) for row in merging]
        for row, merge in zip(merging, self._merged(texts), strict=True):
            if merge is not None:
                self._merging.append(Place(row.record.source))
                self._first_merge = self._first_merge or merge

    def _merged(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str] | None]:
        """Returns for each pair of texts the tokens that differ, apart and joint; None if the pair does not merge."""
        distinct = list(dict.fromkeys(prompt for prompt, _ in pairs))  # templates end all prompts alike
        prompts = dict(zip(distinct, encode_prompts(self._tokenizer, distinct), strict=True))
        responses = encode_responses(self._tokenizer, [response for _, response in pairs], append_eos=False)
        whole = encode_prompts(self._tokenizer, [prompt + response for prompt, response in pairs])
        return [
            None if joint == prompts[prompt] + response else self._difference(prompts[prompt], response, joint)
            for (prompt, _), response, joint in zip(pairs, responses, whole, strict=True)
        ]

    def _difference(self, prompt: list[int], response: list[int], joint: list[int]) -> tuple[str, str]:
        """Returns the tokens that differ, as text: of the two texts apart, and of the joint text."""
        apart = prompt + response
        shortest = min(len(apart), len(joint))
        first = next((index for index in range(shortest) if apart[index] != joint[index]), shortest)
        behind = next((index for index in range(shortest - first) if apart[-1 - index] != joint[-1 - index]), 0)
        return tuple(
            " + ".join(repr(self._tokenizer.decode([token])) for token in ids[first : len(ids) - behind][:4])
            for ids in (apart, joint)
        )  # type: ignore[return-value]
