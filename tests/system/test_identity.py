import enum
import importlib
import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import sft_lightning
from sft_lightning import ExactMatchGrader, R1ZeroGrader
from sft_lightning.grading.math_processes import Verdict
from sft_lightning.grading.worker_process import WorkerProcess
from sft_lightning.system.identity import identity, identity_with_code, public_name

EXPORTED = sorted(set(sft_lightning.__all__) - {"__version__"})
GRADERS = [name for name in EXPORTED if name.endswith("Grader") and name != "Grader"]


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_names_are_short(name):
    assert public_name(getattr(sft_lightning, name)) == f"sft_lightning.{name}"


@pytest.mark.parametrize("name", [*GRADERS, "Plain", "R1Zero", "TransformersGenerator"])
def test_no_identity_holds_a_module_of_the_package(name):
    text = identity(getattr(sft_lightning, name)())
    assert text.startswith(f"sft_lightning.{name}(")
    assert not re.search(r"sft_lightning\.[a-z_]+\.", text)


def test_other_classes_have_the_path_of_their_module():
    assert public_name(Verdict) == "sft_lightning.grading.math_processes.Verdict"
    assert public_name(WorkerProcess.ask) == "sft_lightning.grading.worker_process.WorkerProcess.ask"
    assert public_name(inspect.Signature) == "inspect.Signature"


def test_a_class_that_borrows_an_exported_name_keeps_its_module():
    class Borrowed:
        pass

    Borrowed.__qualname__, Borrowed.__module__ = "R1ZeroGrader", "sft_lightning.somewhere"
    assert public_name(Borrowed) == "sft_lightning.somewhere.R1ZeroGrader"


def returns():
    """A function as a setting."""


def test_identities_name_the_class_and_its_settings():
    assert identity(ExactMatchGrader()) == "sft_lightning.ExactMatchGrader(ignore_case=False)"
    assert identity(R1ZeroGrader(2.0)) != identity(R1ZeroGrader(3.0))


def test_identities_have_no_addresses_and_no_random_order():
    class Nested:
        def __init__(self):
            self.names = {"b", "a"}
            self.pairs = {"y": 1, "x": [2, None]}
            self.function = returns
            self.inner = ExactMatchGrader(ignore_case=True)
            self._hidden = object()

    module = Nested.__module__
    assert identity(Nested()) == (
        f"{module}.{Nested.__qualname__}(function={module}.returns, "
        "inner=sft_lightning.ExactMatchGrader(ignore_case=True), "
        "names=set('a', 'b'), pairs={'x': list(2, None), 'y': 1})"
    )


class Side(enum.Enum):
    LEFT = 1
    RIGHT = 2


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (re.compile("a"), re.compile("b"), "re.compile('a')"),
        (Path("/a"), Path("/b"), "PosixPath('/a')"),
        (Side.LEFT, Side.RIGHT, "<Side.LEFT: 1>"),
        (torch.float32, torch.bfloat16, "torch.float32"),
        (partial(int, base=2), partial(int, base=3), "functools.partial(<class 'int'>, base=2)"),
        (partial(returns, 1), partial(returns, 2), "functools.partial(<function returns>, 1)"),
    ],
)
def test_settings_without_attributes_are_told_apart(one, other, text):
    first, second = ExactMatchGrader(), ExactMatchGrader()
    first.ignore_case, second.ignore_case = one, other
    assert identity(first) == f"sft_lightning.ExactMatchGrader(ignore_case={text})"
    assert identity(first) != identity(second)


def test_a_bound_method_of_a_builtin_has_an_identity():
    assert identity(re.compile("a").match) == "<built-in method match of re.Pattern object>"


def test_the_identity_of_a_recursive_object_ends():
    grader = ExactMatchGrader()
    grader.itself = grader
    assert identity(grader).count("ExactMatchGrader") == 6


def test_an_identity_is_the_same_in_another_process():
    program = (
        "from sft_lightning import R1ZeroGrader\n"
        "from sft_lightning.system.identity import identity\n"
        "grader = R1ZeroGrader()\ngrader.tags = {'a', 'b', 'c', 'd'}\nprint(identity(grader))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert texts == {
        "sft_lightning.R1ZeroGrader(tags=set('a', 'b', 'c', 'd'), time_limit_seconds=5.0, units='strict')\n"
    }


# Identities with code

RUBRIC = """
class Base:
    words = ["{word}"]

class Rubric(Base):
    def __init__(self, at_most=3):
        self._at_most = at_most
"""


@pytest.fixture
def rubric(tmp_path, monkeypatch):
    """Returns a user's class from a module of this content."""
    monkeypatch.syspath_prepend(tmp_path)

    def rubric(content, name="rubric_of_a_user"):
        (tmp_path / f"{name}.py").write_text(content)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module(name).Rubric

    yield rubric
    for name in ("rubric_of_a_user", "own_rubric_of_a_user"):
        sys.modules.pop(name, None)


def test_code_of_the_package_is_told_by_its_version():
    assert identity_with_code(ExactMatchGrader()) == "sft_lightning.ExactMatchGrader(ignore_case=False)"
    assert identity_with_code(R1ZeroGrader()) == (
        "sft_lightning.R1ZeroGrader(time_limit_seconds=5.0, units='strict')/2"
    )


def test_a_users_class_is_told_by_its_source_and_arguments(rubric):
    first = rubric(RUBRIC.format(word="one"))
    text = identity_with_code(first())
    assert re.fullmatch(r"rubric_of_a_user\.Rubric\(_at_most=3\):[0-9a-f]{16}", text)
    assert identity_with_code(first(4)) != text
    assert identity_with_code(rubric(RUBRIC.format(word="one"))()) == text
    assert identity_with_code(rubric(RUBRIC.format(word="two"))()) != text


def test_a_base_class_in_another_file_counts(rubric):
    own = "from rubric_of_a_user import Base\nfrom sft_lightning import R1ZeroGrader\n"
    own += "class Rubric(Base, R1ZeroGrader): ...\n"
    texts = []
    for word in ("one", "two"):
        rubric(RUBRIC.format(word=word))
        texts.append(identity_with_code(rubric(own, "own_rubric_of_a_user")()))
    assert texts[0] != texts[1]
    assert texts[0].startswith("own_rubric_of_a_user.Rubric(time_limit_seconds=5.0, units='strict')/2:")


def test_code_without_a_file_counts():
    def made(text):
        names = {"__name__": "no_file"}
        exec(f"class Rubric:\n    def grade(self):\n        return [lambda: {text!r}]", names)
        return identity_with_code(names["Rubric"]())

    assert made("one") == made("one") != made("two")
