"""Find the training rows that are hardest, memorized or likely mislabeled, from the losses that were recorded.

The rules, in nats and over the completely recorded epochs:

- **hardest**: the highest nll per label token in the last epoch.
- **memorized**: in the last epoch the probability of the whole response is above one half (its nll is below log 2), and
  in the first it is not. Losses cannot show whether the model learned the row or the pattern behind it: that takes a
  model trained without the row (Feldman and Zhang, 2020).
- **mislabeled**: networks fit right labels before wrong ones (Arpit et al., 2017), so the loss of a wrong label stays
  high while that of others falls: the small-loss criterion of Co-teaching (Han et al., 2018) and, averaged over epochs,
  the idea of Area Under the Margin (Pleiss et al., 2020). The first epoch does not count, because there the loss of a
  row depends on when it was seen. In the later ones the nll per label token of a likely mislabeled row (1) is on
  average more than ``MISLABELED_SCORE`` robust standard deviations above the median row, and (2) falls by less than
  half as much as that of the median row, on a logarithmic scale. The rule needs three epochs.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from sft_lightning.errors import UserError

# Of a run. RowLossRecorder writes it.
FOLDER = "row_losses"
MISLABELED_SCORE = 5.0
EPOCHS_TO_FIND_MISLABELED = 3
EPOCHS_TO_FIND_MEMORIZED = 2
# Ratio of the standard deviation of a normal distribution to its median absolute deviation.
_DEVIATIONS_OF_NORMAL = 1.4826
_EXCERPT_CHARACTERS = 120
_COLUMNS = ("source", "epoch", "num_labels", "nll_sum")


@dataclass(frozen=True, slots=True)
class RowLossEntry:
    """A training row that stands out.

    Attributes:
        source: ``file:line``.
        num_labels: Number of label tokens.
        nll: Nats per label token in each epoch of the findings; None if the epoch did not contain the row.
        score: The sort key of its list: nats per label token (hardest), decrease of the nll of the whole response in
            nats (memorized), or robust standard deviations above the median (mislabeled).
        excerpt: The end of the prompt and the response, if the line of the file still contains them.
    """

    source: str
    num_labels: int
    nll: tuple[float | None, ...]
    score: float
    excerpt: str | None = None


@dataclass(frozen=True, slots=True)
class RowLossFindings:
    """Training rows that stand out. The lists are sorted by decreasing score.

    Attributes:
        epochs: The epochs, from 0, up to the last complete one.
        num_rows: Number of recorded rows.
        hardest: Rows with the highest loss.
        memorized: Memorized rows; empty before ``EPOCHS_TO_FIND_MEMORIZED``.
        mislabeled: Rows that look mislabeled; empty before ``EPOCHS_TO_FIND_MISLABELED``.
        num_memorized: How many rows match the rule; the list may have only the first of them.
        num_mislabeled: Likewise.
        damaged: Files that cannot be read; the rest does not contain their rows.
    """

    epochs: tuple[int, ...]
    num_rows: int
    hardest: list[RowLossEntry]
    memorized: list[RowLossEntry]
    mislabeled: list[RowLossEntry]
    num_memorized: int
    num_mislabeled: int
    damaged: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """Names the damaged files; empty if there are none."""
        return f"left out what cannot be read: {', '.join(self.damaged)}" if self.damaged else ""


def read_row_losses(run: str | Path, *, most: int = 20) -> RowLossFindings | None:
    """Returns the rows of a run that stand out, at most ``most`` of each kind; None if no losses were recorded.

    Raises:
        UserError: If none of the files of the losses can be read.
    """
    tables, damaged = _read_parts(Path(run) / FOLDER)
    table = _Table.of(tables)
    if table is None and damaged:
        raise UserError(f"none of the row losses in '{Path(run) / FOLDER}' can be read; {damaged[0]} is damaged")
    if table is None:
        return None
    ranked = {"hardest": table.hardest(), "memorized": table.memorized(), "mislabeled": table.mislabeled()}
    lists = {name: table.rows(ranking, most) for name, ranking in ranked.items()}
    excerpts = _read_excerpts({row.source for rows in lists.values() for row in rows})
    lists = {name: [replace(row, excerpt=excerpts.get(row.source)) for row in rows] for name, rows in lists.items()}
    return RowLossFindings(
        epochs=table.epochs,
        num_rows=len(table.sources),
        num_memorized=len(ranked["memorized"][0]),
        num_mislabeled=len(ranked["mislabeled"][0]),
        damaged=tuple(damaged),
        **lists,
    )


def describe_row_losses(findings: RowLossFindings, *, most: int = 5) -> list[str]:
    """Returns lines for a terminal: at most ``most`` rows of each kind with their nll per label token in each epoch."""
    lines = [f"row losses: {findings.note}"] if findings.note else []
    lines += [f"row losses: {findings.num_rows} rows, {len(findings.epochs)} epochs, nll in nats per label token"]
    kinds = [
        ("hardest", 1, findings.hardest, findings.num_rows),
        ("memorized", EPOCHS_TO_FIND_MEMORIZED, findings.memorized, findings.num_memorized),
        ("likely mislabeled", EPOCHS_TO_FIND_MISLABELED, findings.mislabeled, findings.num_mislabeled),
    ]
    for name, num_epochs, rows, number in kinds:
        if len(findings.epochs) < num_epochs:
            lines.append(f"{name}: cannot be found before {num_epochs} epochs")
            continue
        lines.append(f"{name}: {min(most, len(rows))} of {number} rows")
        for row in rows[:most]:
            nll = " ".join("     -" if value is None else f"{value:6.3f}" for value in row.nll)
            lines.append(f"  {nll}  {_printable(row.source)}  {_printable(row.excerpt or '')}".rstrip())
    return lines


# Row indices by decreasing score, and their scores.
_Ranking = tuple[np.ndarray, np.ndarray]
_NO_ROWS: _Ranking = (np.empty(0, dtype=np.int64), np.empty(0))


@dataclass(frozen=True, slots=True)
class _Table:
    """The losses as a table of R rows and E epochs.

    Attributes:
        sources: Shape [R].
        epochs: Shape [E].
        nll_sums: Shape [R, E], NaN where the epoch did not contain the row.
        num_labels: Shape [R].
    """

    sources: list[str]
    epochs: tuple[int, ...]
    nll_sums: np.ndarray
    num_labels: np.ndarray

    @classmethod
    def of(cls, tables: Sequence[Any]) -> "_Table | None":
        columns = _join(tables)
        if columns is None:
            return None
        sources, rows = columns["source"]
        epochs, epoch_of = np.unique(columns["epoch"], return_inverse=True)
        nll_sums = np.full((len(sources), len(epochs)), np.nan)
        nll_sums[rows, epoch_of] = columns["nll_sum"]
        num_labels = np.ones(len(sources), dtype=np.int64)
        num_labels[rows] = columns["num_labels"]
        # An unfinished epoch has only the rows that came first.
        num_seen = np.isfinite(nll_sums).sum(axis=0)
        in_full = int(np.flatnonzero(num_seen == num_seen.max())[-1]) + 1
        return cls(sources, tuple(epochs[:in_full].tolist()), nll_sums[:, :in_full], num_labels)

    @property
    def nll(self) -> np.ndarray:
        """Nats per label token. Shape [R, E]."""
        return self.nll_sums / self.num_labels[:, None]

    def hardest(self) -> _Ranking:
        last = self.nll[:, -1]
        return _rank(last, np.isfinite(last))

    def memorized(self) -> _Ranking:
        if len(self.epochs) < EPOCHS_TO_FIND_MEMORIZED:
            return _NO_ROWS
        first, last = self.nll_sums[:, 0], self.nll_sums[:, -1]
        return _rank(first - last, (last < log(2)) & (first >= log(2)))

    def mislabeled(self) -> _Ranking:
        if len(self.epochs) < EPOCHS_TO_FIND_MISLABELED:
            return _NO_ROWS
        later = self.nll[:, 1:]
        remaining = np.divide(later[:, -1], later[:, 0], out=np.full(len(later), np.nan), where=later[:, 0] > 0)
        seen = np.isfinite(remaining)
        typical = np.median(remaining[seen]) if seen.any() else 1.0
        if typical >= 1:
            return _NO_ROWS  # no loss falls, so none stays high
        scores = np.full(len(later), np.nan)
        scores[seen] = _robust_z(np.nanmean(later[seen], axis=1))
        return _rank(scores, (scores > MISLABELED_SCORE) & (remaining > np.sqrt(typical)))

    def rows(self, ranking: _Ranking, most: int) -> list[RowLossEntry]:
        places, scores = ranking
        nll = self.nll
        return [
            RowLossEntry(
                source=self.sources[place],
                num_labels=int(self.num_labels[place]),
                nll=tuple(float(value) if np.isfinite(value) else None for value in nll[place]),
                score=float(score),
            )
            for place, score in zip(places[:most].tolist(), scores[:most], strict=True)
        ]


def _read_parts(folder: Path) -> tuple[list[Any], list[str]]:
    """Returns the tables that can be read, and the names of the files that cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.int32(), pa.int32(), pa.float64())
    schema = pa.schema(list(zip(_COLUMNS, types, strict=True)))
    tables, damaged = [], []
    for path in sorted(folder.glob("epoch-*/step-*.rank-*.parquet")):
        try:
            table = pq.read_table(path, columns=list(_COLUMNS)).cast(schema)
            if any(column.null_count for column in table.columns):
                raise ValueError("missing values")
            tables.append(table)
        except (OSError, ValueError, pa.ArrowException):
            damaged.append(path.relative_to(folder.parent).as_posix())
    return tables, damaged


def _join(tables: Sequence[Any]) -> dict[str, Any] | None:
    """Returns the columns of all tables, ``source`` as (distinct values, index of the value of each row)."""
    import pyarrow as pa

    if not sum(map(len, tables)):
        return None
    table = pa.concat_tables(tables)
    source = table["source"].combine_chunks().dictionary_encode()
    numbers = {name: table[name].to_numpy() for name in _COLUMNS[1:]}
    return {"source": (source.dictionary.to_pylist(), source.indices.to_numpy()), **numbers}


def _rank(values: np.ndarray, chosen: np.ndarray) -> _Ranking:
    places = np.flatnonzero(chosen)
    places = places[np.argsort(-values[places], kind="stable")]
    return places, values[places]


def _robust_z(values: np.ndarray) -> np.ndarray:
    """Returns how many standard deviations above the median each value is, estimated robustly.

    Returns zeros if half of the values are equal, where the estimate is undefined.
    """
    deviations = values - np.median(values)
    scale = _DEVIATIONS_OF_NORMAL * np.median(np.abs(deviations))
    return deviations / scale if scale > 0 else np.zeros_like(values)


def _read_excerpts(sources: Iterable[str]) -> dict[str, str]:
    """Returns source -> excerpt for the lines of JSONL files that still exist and contain a row."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for source in sources:
        file, _, line = source.rpartition(":")
        if line.isdecimal() and not file.endswith(".parquet"):
            wanted[file].add(int(line))
    found = {}
    for file, lines in wanted.items():
        try:
            with Path(file).open("rb") as stream:
                for number, text in zip(range(1, max(lines) + 1), stream, strict=False):
                    if number in lines and (excerpt := _excerpt(text)) is not None:
                        found[f"{file}:{number}"] = excerpt
        except OSError:
            continue  # the data may have moved since training
    return found


def _excerpt(line: bytes) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, Mapping):
        return None
    texts = [row.get(ours, row.get(theirs)) for ours, theirs in (("prompt", "question"), ("response", "answer"))]
    if not all(isinstance(text, str) for text in texts):
        # Other columns: their texts in the order of the file.
        texts = [text for text in row.values() if isinstance(text, str)][:2]
    prompt, *response = (" ".join(text.split()) for text in texts or [""])
    ends = [prompt if len(prompt) <= _EXCERPT_CHARACTERS else f"... {prompt[-_EXCERPT_CHARACTERS:]}"]
    half = _EXCERPT_CHARACTERS // 2
    ends += [text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}" for text in response]
    return " => ".join(ends) or None


def _printable(text: str) -> str:
    """Returns the text with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
