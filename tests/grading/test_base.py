import subprocess
import sys

import pytest

from sft_lightning.errors import UserError
from sft_lightning.grading.base import Grade, Grader, grade_row, grader_identity
from sft_lightning.grading.graders import ExactMatchGrader, R1ZeroGrader


@pytest.mark.parametrize(
    ("format_correct", "answer_correct", "reward"), [(True, True, 1.0), (True, False, 0.0), (False, True, 0.0)]
)
def test_reward_wants_both(format_correct, answer_correct, reward):
    assert Grade(format_correct, answer_correct).reward == reward


class Returns:
    """No subclass of Grader, and none is needed."""

    def __init__(self, what):
        self.what = what

    def grade(self, response, ground_truth):
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what


def test_a_grader_is_what_has_a_method_grade():
    class Scores:
        def score(self, response, ground_truth): ...

    assert issubclass(Returns, Grader)
    assert isinstance(Returns(None), Grader)
    assert not issubclass(Scores, Grader)
    assert not issubclass(Returns, R1ZeroGrader)


def test_a_row_is_graded():
    assert grade_row(Returns(Grade(True, False, "wrong")), 3, "a", "b") == Grade(True, False, "wrong")


def test_a_bug_in_a_grader_is_told_with_its_row_and_place():
    with pytest.raises(UserError) as caught:
        grade_row(Returns(ZeroDivisionError("by\nzero")), 3, "a", "b")
    line = Returns.grade.__code__.co_firstlineno + 2
    name = f"{Returns.__module__}.Returns"
    assert str(caught.value) == f"grader {name} failed on row 3: ZeroDivisionError: by zero (test_base.py, line {line})"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("what", "kind"), [(True, "bool"), (1.0, "float"), (None, "NoneType")])
def test_what_is_no_grade_is_refused(what, kind):
    with pytest.raises(UserError, match=rf"Returns returned a {kind} for row 3; it must return a Grade$"):
        grade_row(Returns(what), 3, "a", "b")


def test_a_users_mistake_comes_through_as_it_is():
    with pytest.raises(UserError, match=r"^ground_truth None must be"):
        grade_row(R1ZeroGrader(), 3, "a", None)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError()])
def test_running_out_of_something_is_a_wrong_answer(error):
    assert grade_row(Returns(error), 3, "a", "b") == Grade(False, False, "crashed")


def test_identities_name_the_class_and_its_settings():
    assert grader_identity(ExactMatchGrader()) == "sft_lightning.grading.graders.ExactMatchGrader(ignore_case=False)"
    assert grader_identity(R1ZeroGrader(2.0)) != grader_identity(R1ZeroGrader(3.0))


def test_identities_of_settings_have_no_address_and_no_order_by_chance():
    class Nested:
        def __init__(self):
            self.names = {"b", "a"}
            self.pairs = {"y": 1, "x": [2, None]}
            self.function = test_a_row_is_graded
            self.inner = ExactMatchGrader(ignore_case=True)
            self._hidden = object()

    module = Nested.__module__
    assert grader_identity(Nested()) == (
        f"{module}.{Nested.__qualname__}(function={module}.test_a_row_is_graded, "
        "inner=sft_lightning.grading.graders.ExactMatchGrader(ignore_case=True), "
        "names=set('a', 'b'), pairs={'x': list(2, None), 'y': 1})"
    )


def test_an_identity_of_itself_comes_to_an_end():
    grader = Returns(None)
    grader.what = grader
    assert grader_identity(grader).count("Returns") == 6


def test_an_identity_is_the_same_in_another_process():
    program = (
        "from sft_lightning.grading.graders import *\n"
        "grader = R1ZeroGrader()\ngrader.tags = {'a', 'b', 'c', 'd'}\nprint(grader_identity(grader))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert texts == {
        "sft_lightning.grading.graders.R1ZeroGrader(tags=set('a', 'b', 'c', 'd'), time_limit_seconds=5.0)\n"
    }
