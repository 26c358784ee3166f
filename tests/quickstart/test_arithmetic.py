import json
import re
from itertools import pairwise

import pytest

from sft_lightning.quickstart.arithmetic import NAMES, THINGS, Problem, Story, make_problems, write_arithmetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    write_arithmetic(folder)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row):
    return re.fullmatch(r".*\nUser: (.*)\nAssistant: <think>", row["prompt"], re.DOTALL)[1]


def calculation(row):
    """The question with everything but its wording and numbers blotted out, and no spaces."""
    return re.sub(rf"\b({'|'.join([*NAMES.split(), *THINGS.split()])})\b|\s", "", question(row))


def test_one_step_problem():
    story = Story("{name} gives {b} of {a} {things} to {other}. How many are left?", "-")
    problem = Problem(story, (15, 7), "Ada", "Ben", "nuts")
    assert problem.question == "Ada gives 7 of 15 nuts to Ben. How many are left?"
    assert problem.solution == "15-7=8.\n#### 8"


def test_two_step_problem_is_worked_from_left_to_right():
    story = Story("{name} opens {a} boxes of {b} {things} and loses {c}. How many are left?", "*-")
    problem = Problem(story, (3, 4, 5), "Ada", "Ben", "nuts")
    assert problem.question == "Ada opens 3 boxes of 4 nuts and loses 5. How many are left?"
    assert problem.solution == "First 3*4=12. Then 12-5=7.\n#### 7"


@pytest.mark.parametrize(("name", "num_rows"), [("train", 6400), ("heldout", 320)])
def test_every_row_is_r1_zero_and_its_arithmetic_is_right(folder, name, num_rows):
    found = rows(folder / f"{name}.jsonl")
    assert len(found) == num_rows
    num_steps = set()
    for row in found:
        assert set(row) == {"prompt", "response", "ground_truth"}
        thought, answer = re.fullmatch(r" (.+)\. </think> <answer> (\d+) </answer>", row["response"]).groups()
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", thought)
        operands = [steps[0][0]]
        for left, operation, right, result in steps:
            expected = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }[operation]
            assert int(result) == expected >= 1
            operands.append(right)
        assert all(before[3] == after[0] for before, after in pairwise(steps))
        assert steps[-1][3] == answer == row["ground_truth"]
        assert sorted(operands) == sorted(re.findall(r"\d+", question(row)))
        assert all(2 <= int(number) <= 20 for number in operands)
        num_steps.add(len(steps))
    assert num_steps == {1, 2}


def test_no_heldout_calculation_is_in_train(folder):
    train = rows(folder / "train.jsonl")
    heldout = [calculation(row) for row in rows(folder / "heldout.jsonl")]
    assert len(set(heldout)) == len(heldout)
    assert not set(heldout) & {calculation(row) for row in train}
    assert len({row["prompt"] for row in train}) == len(train)


def test_names_and_things_vary(folder):
    words = set(re.findall(r"\w+", " ".join(question(row) for row in rows(folder / "heldout.jsonl"))))
    assert {*NAMES.split(), *THINGS.split()} <= words


def test_the_seed_decides_every_byte(folder, tmp_path):
    write_arithmetic(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert make_problems(num_train=9, num_heldout=9, seed=0) != make_problems(num_train=9, num_heldout=9, seed=1)
