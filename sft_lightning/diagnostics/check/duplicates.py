"""Find rows that occur more than once, in one set or in both, by digests of their texts.

A row gets a blake2b digest of 16 bytes for each kind of equality. The probability that two different texts among a
billion rows share a digest is 1e-21.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from sft_lightning.diagnostics.check.findings import Finding, Place, by_share, counted
from sft_lightning.diagnostics.check.rows import Row, Sources

_DIGEST_BYTES = 16


class RowDigests:
    """Digests of a set's rows, 64 bytes a row.

    Args:
        set_name: ``train`` or ``val``.
        sources: ``file:line`` of each row; may grow along with the rows.
    """

    def __init__(self, set_name: str, sources: Sources) -> None:
        self.set_name = set_name
        self.sources = sources
        self._digests = {name: bytearray() for name in ("prompt", "row", "loose_prompt", "loose_row")}

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, in file order."""
        for record, _ in rows:
            texts = record.prompt, record.response
            for kind, (prompt, response) in (("", texts), ("loose_", map(_loosely, texts))):
                digest = hashlib.blake2b(prompt.encode(), digest_size=_DIGEST_BYTES)
                self._digests[f"{kind}prompt"] += digest.digest()
                # Includes the prompt's digest, so that rows with the same text but another boundary are not equal.
                digest = hashlib.blake2b(digest.digest() + response.encode(), digest_size=_DIGEST_BYTES)
                self._digests[f"{kind}row"] += digest.digest()

    def __len__(self) -> int:
        return len(self._digests["row"]) // _DIGEST_BYTES

    def of(self, kind: str) -> np.ndarray:
        """Returns the digests of ``prompt``, ``row``, ``loose_prompt`` or ``loose_row``. Shape [rows], bytes."""
        return np.frombuffer(bytes(self._digests[kind]), dtype=f"S{_DIGEST_BYTES}")


def check_duplicates(digests: RowDigests) -> list[Finding]:
    """Returns findings about rows that repeat an earlier row of the set, exactly or up to case and white space.

    Several different responses to one prompt are legitimate, and reported as information.
    """
    name, num_rows = digests.set_name, len(digests)
    exact, loose = _first_equals(digests.of("row")), _first_equals(digests.of("loose_row"))
    again = np.flatnonzero(exact != np.arange(num_rows)).tolist()
    nearly = np.flatnonzero((loose != np.arange(num_rows)) & (exact == np.arange(num_rows))).tolist()
    findings = []
    if again:
        findings.append(
            Finding(
                "duplicate_rows",
                "warning",
                f"{name}: {counted(len(again), 'row repeats', 'rows repeat')} an earlier one, prompt and response",
                "delete them; to count a row twice, set its field weight",
                len(again),
                [Place(digests.sources[row], digests.sources[exact[row]]) for row in again],
            )
        )
    if nearly:
        findings.append(
            Finding(
                "near_duplicate_rows",
                "warning",
                f"{name}: {counted(len(nearly), 'row repeats', 'rows repeat')} an earlier one but for case and spaces",
                "keep one of each",
                len(nearly),
                [Place(digests.sources[row], digests.sources[loose[row]]) for row in nearly],
            )
        )
    return findings + _several_responses(digests, exact)


def check_overlap(train: RowDigests, val: RowDigests) -> list[Finding]:
    """Returns a finding about the rows of ``val`` whose prompt is also in ``train``, up to case and white space.

    Args:
        train: At least one row.
        val: At least one row.
    """
    seen, first = np.unique(train.of("loose_prompt"), return_index=True)
    prompts = val.of("loose_prompt")
    places = np.minimum(np.searchsorted(seen, prompts), len(seen) - 1)
    shared = np.flatnonzero(seen[places] == prompts).tolist()
    if not shared:
        return []
    same_response = np.isin(val.of("loose_row")[shared], train.of("loose_row")).tolist()
    rows = [
        Place(val.sources[row], train.sources[first[places[row]]], "same response" if same else "another response")
        for row, same in zip(shared, same_response, strict=True)
    ]
    return [
        Finding(
            "validation_overlap",
            by_share(len(shared), len(val)),
            f"val: {len(shared):,} of {counted(len(val), 'row')} have a prompt that is in train, "
            f"{sum(same_response):,} of them with the same response",
            "remove them from one of the two: memorized responses say nothing about new prompts",
            len(shared),
            rows,
        )
    ]


def _several_responses(digests: RowDigests, first_equal: np.ndarray) -> list[Finding]:
    _, first, number = np.unique(digests.of("prompt"), return_index=True, return_inverse=True)
    distinct_rows = np.bincount(number[np.unique(first_equal)], minlength=len(first)) if len(digests) else number
    several = np.flatnonzero(distinct_rows > 1)
    if not len(several):
        return []
    return [
        Finding(
            "several_responses",
            "info",
            f"{digests.set_name}: {counted(len(several), 'prompt has', 'prompts have')} several responses, "
            f"{int(distinct_rows[several].sum()):,} rows together",
            "",
            len(several),
            [Place(digests.sources[row]) for row in np.sort(first[several])],
        )
    ]


def _first_equals(digests: np.ndarray) -> np.ndarray:
    """Returns for each row the index of the first row that equals it, possibly its own. Shape [rows], int64."""
    _, first, number = np.unique(digests, return_index=True, return_inverse=True)
    return first[number]


def _loosely(text: str) -> str:
    return " ".join(text.casefold().split())
