"""CorrectResponses: the row filter of ``data.filter_correct``."""

from collections.abc import Sequence

from sft_lightning.data.records import Record
from sft_lightning.grading.graders import Grader, grade_all
from sft_lightning.system.identity import identity


class CorrectResponses:
    """Accepts the rows whose response a grader rewards, in format and answer, against their own ground truth.

    Args:
        grader: What judges a response.
    """

    def __init__(self, grader: Grader) -> None:
        self._grader = grader

    @property
    def identity(self) -> str:
        return identity(self._grader)

    def faults(self, records: Sequence[Record]) -> list[str | None]:
        """Returns the failure of each record's response, or None where it is rewarded.

        Raises:
            UserError: If the grader cannot judge by a ground truth of this kind.
        """
        responses = [record.response for record in records]
        grades = grade_all(self._grader, responses, [record.ground_truth for record in records])
        return [None if grade.reward == 1 else grade.failure or "wrong" for grade in grades]
