import pytest

from sft_lightning.errors import UserError
from sft_lightning.grading.base import Grade, Grader, grade_row
from sft_lightning.grading.graders import R1ZeroGrader


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


def test_a_grader_is_any_object_with_a_grade_method():
    class Scores:
        def score(self, response, ground_truth): ...

    assert issubclass(Returns, Grader)
    assert isinstance(Returns(None), Grader)
    assert not issubclass(Scores, Grader)
    assert not issubclass(Returns, R1ZeroGrader)


def test_a_row_is_graded():
    assert grade_row(Returns(Grade(True, False, "wrong")), 3, "a", "b") == Grade(True, False, "wrong")


def test_an_exception_of_a_grader_names_row_and_line():
    with pytest.raises(UserError) as caught:
        grade_row(Returns(ZeroDivisionError("by\nzero")), 3, "a", "b")
    line = Returns.grade.__code__.co_firstlineno + 2
    name = f"{Returns.__module__}.Returns"
    assert str(caught.value) == f"grader {name} failed on row 3: ZeroDivisionError: by zero (test_base.py, line {line})"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("what", "kind"), [(True, "bool"), (1.0, "float"), (None, "NoneType")])
def test_a_result_that_is_not_a_grade_is_refused(what, kind):
    with pytest.raises(UserError, match=rf"Returns returned a {kind} for row 3; it must return a Grade$"):
        grade_row(Returns(what), 3, "a", "b")


def test_a_users_mistake_comes_through_as_it_is():
    with pytest.raises(UserError, match=r"^ground_truth None must be"):
        grade_row(R1ZeroGrader(), 3, "a", None)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError()])
def test_running_out_of_something_is_a_wrong_answer(error):
    assert grade_row(Returns(error), 3, "a", "b") == Grade(False, False, "crashed")
