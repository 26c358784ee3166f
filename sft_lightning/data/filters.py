"""Filter rows by their response before they are tokenized."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

from sft_lightning.data.formats.base import Record
from sft_lightning.data.load_report import LoadReport
from sft_lightning.grading.graders import Grader, grade_all
from sft_lightning.system.identity import identity_with_code

_RECORDS_AT_ONCE = 1024


class RowFilter(Protocol):
    """Accepts or rejects rows that have a ground truth."""

    @property
    def identity(self) -> str:
        """Text that changes whenever a verdict may change. It is part of the token cache's key."""

    def faults(self, records: Sequence[Record]) -> list[str | None]:
        """Returns for each record why it is rejected, in a word or two, or None if it is accepted."""


class CorrectResponses:
    """Accepts the rows whose response a grader rewards, in format and answer, against their own ground truth.

    Args:
        grader: Grades the responses.
    """

    def __init__(self, grader: Grader) -> None:
        self._grader = grader

    @property
    def identity(self) -> str:
        return identity_with_code(self._grader)

    def faults(self, records: Sequence[Record]) -> list[str | None]:
        """Returns why each record's response gets no reward, or None if it gets one.

        Raises:
            UserError: If the grader cannot grade against a ground truth of this kind.
        """
        responses = [record.response for record in records]
        grades = grade_all(self._grader, responses, [record.ground_truth for record in records])
        return [None if grade.reward == 1 else grade.failure or "wrong" for grade in grades]


def filter_records(records: Iterator[Record], row_filter: RowFilter, load_report: LoadReport) -> Iterator[Record]:
    """Yields the records that the filter accepts, in order, and adds the others to ``load_report``.

    A record without a ground truth cannot be judged and is skipped. Records are judged in chunks, so that memory stays
    flat and the filter can work on many records at a time.
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
