"""Grade each response against the ground truth of its row."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sft_lightning.diagnostics.check.findings import Finding, Place, by_share, counted
from sft_lightning.diagnostics.check.rows import Row
from sft_lightning.grading.graders import Grade, Grader, grade_all

# Large, because each call starts new grading processes.
_GRADED_AT_ONCE = 8192
# Grading stops after this many failures: more add no information, and each can take seconds of computer algebra.
_MOST_FAILED = 2000


class GroundTruths:
    """Collects findings about responses that fail by their own ground truth, and about unusable ground truths.

    Args:
        set_name: ``train`` or ``val``.
        grader: ``evaluation.grader``.
    """

    def __init__(self, set_name: str, grader: Grader) -> None:
        self._set_name = set_name
        self._grader = grader
        self._waiting: list[tuple[str, str, Any]] = []
        self.num_rows = 0
        self.num_graded = 0
        self._num_form_correct = 0
        self._rejected: list[Place] = []
        self._failed: dict[bool, list[Place]] = {False: [], True: []}  # by whether the format is correct
        self._gave_up = False

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, in file order."""
        for record, _ in rows:
            self.num_rows += 1
            if record.ground_truth is not None and not self._gave_up:
                self._waiting.append((record.source, record.response, record.ground_truth))
        if len(self._waiting) >= _GRADED_AT_ONCE:
            self._grade()

    def findings(self, *, stops_evaluation: bool) -> list[Finding]:
        """Returns the findings.

        Args:
            stops_evaluation: Whether a run grades answers against these ground truths, and would stop at one that the
                grader rejects.
        """
        self._grade()
        name, grader = self._set_name, type(self._grader).__name__
        findings = []
        if count := len(self._rejected):
            severity = "error" if stops_evaluation else by_share(count, self.num_rows)
            message = f"{name}: {counted(count, 'ground truth is', 'ground truths are')} refused by {grader}"
            fix = "use text, a number or a list of those, not empty"
            findings.append(Finding("rejected_ground_truths", severity, message, fix, count, self._rejected))
        rest = ", and no more were graded" if self._gave_up else ""
        if self.num_graded and not self._num_form_correct:
            findings.append(
                Finding(
                    "other_form",
                    "warning",
                    f"{name}: none of {self.num_graded:,} responses with a ground truth has the form that {grader} "
                    f"asks for{rest}",
                    "the data is of another form: name its grader in evaluation.grader, or render it with a template",
                    self.num_graded,
                )
            )
            return findings
        for form_correct, kind, text, fix in (
            (True, "wrong_answers", "fail by their own ground truth", "correct the response or the ground truth"),
            (False, "wrong_form", f"lack the form that {grader} asks for", "correct these rows"),
        ):
            if places := self._failed[form_correct]:
                reasons = Counter(place.reason for place in places)
                listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
                message = f"{name}: {len(places):,} of {self.num_graded:,} responses {text} ({listed}){rest}"
                severity = by_share(len(places), self.num_graded)
                findings.append(Finding(kind, severity, message, fix, len(places), places))
        return findings

    def _grade(self) -> None:
        waiting, self._waiting = self._waiting, []
        for (source, *_), grade in zip(waiting, self._grades(waiting), strict=True):
            if grade is None:
                continue
            self.num_graded += 1
            self._num_form_correct += grade.format_correct
            if grade.reward < 1.0:
                self._failed[grade.format_correct].append(Place(source, reason=grade.failure or "wrong"))
        self._gave_up |= sum(map(len, self._failed.values())) >= _MOST_FAILED

    def _grades(self, rows: Sequence[tuple[str, str, Any]]) -> list[Grade | None]:
        """Returns the grades, None for each ground truth that the grader rejects."""
        try:
            return list(grade_all(self._grader, [row[1] for row in rows], [row[2] for row in rows]))
        except Exception as error:  # graders are user code
            if len(rows) == 1:
                reason = " ".join(str(error).split()) or type(error).__name__
                self._rejected.append(Place(rows[0][0], reason=f"{reason:.120}"))
                return [None]
        middle = len(rows) // 2
        return self._grades(rows[:middle]) + self._grades(rows[middle:])
