"""Row filters: which of the rows that can be read are trained on."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.records import Record

_RECORDS_AT_ONCE = 1024


class RowFilter(Protocol):
    """Judges rows that have a ground truth by their response."""

    @property
    def identity(self) -> str:
        """Text that changes whenever its judgement may: it is part of the token cache's key."""

    def faults(self, records: Sequence[Record]) -> list[str | None]:
        """Returns for each record why it is not accepted, in a word or two, or None where it is."""


def filter_records(records: Iterator[Record], row_filter: RowFilter, load_report: LoadReport) -> Iterator[Record]:
    """Yields the records that the filter accepts, in order; ``load_report`` is told of the others.

    A record without a ground truth cannot be judged, so it is not accepted either. Records are judged in chunks:
    memory stays flat, and the filter may work on many at a time.
    """
    while chunk := list(itertools.islice(records, _RECORDS_AT_ONCE)):
        judged = [record for record in chunk if record.ground_truth is not None]
        faults = iter(row_filter.faults(judged))
        for record in chunk:
            if record.ground_truth is None:
                load_report.ungraded_rows.add(record.source, "no ground_truth")
            elif fault := next(faults):
                load_report.rejected_rows.add(record.source, fault)
            else:
                yield record
