"""Generate the quickstart's data set: arithmetic word problems with worked solutions."""

import json
import operator
import random
from dataclasses import dataclass
from pathlib import Path

from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.system.files import write_atomically


@dataclass(frozen=True, slots=True)
class Story:
    """The wording of a problem. ``operations`` are applied from left to right to the numbers a, b and c."""

    question: str
    operations: str


STORIES = (
    Story("{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", "+"),
    Story("There are {a} {things} on a table and {b} in a drawer. How many {things} are there in all?", "+"),
    Story("{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} keep?", "-"),
    Story("{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?", "-"),
    Story("{name} loses {b} of {a} {things}. How many {things} are left?", "-"),
    Story("{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?", "*"),
    Story("{name} gives {b} {things} to each of {a} friends. How many {things} does {name} give away?", "*"),
    Story("{name} finds {a} {things}, then {b}, then {c}. How many {things} does {name} find in all?", "++"),
    Story("{name} has {a} {things}, {other} {b} and Grandma {c}. How many {things} do they have?", "++"),
    Story("{name} has {a} {things}, buys {b} and gives {c} to {other}. How many {things} are left?", "+-"),
    Story("A shop has {a} {things}. It gets {b} more and sells {c}. How many {things} does it have?", "+-"),
    Story("{name} has {a} {things}, loses {b} and finds {c}. How many {things} does {name} have now?", "-+"),
    Story("Of {a} {things}, {name} sells {b} and {other} sells {c}. How many {things} are left?", "--"),
    Story("{name} has {a} bags of {b} {things} and {c} more {things}. How many {things} is that?", "*+"),
    Story("{name} opens {a} packs of {b} {things} and drops {c}. How many {things} are left?", "*-"),
    Story("There are {b} {things} on each of {a} shelves. {name} takes {c}. How many {things} stay?", "*-"),
)
NAMES = "Ada Ben Cleo Dan Ella Finn Gita Hugo Iris Jon Kira Leo Mia Noah Olga Paul Rosa Sam Tara Uma Vera Will"
THINGS = (
    "apples beads books buttons cards coins cups eggs flags keys lemons marbles nuts pears pens plums ribbons "
    "seeds shells spoons stamps stickers stones toys"
)
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem: a story with numbers, two people and the things that are counted."""

    story: Story
    numbers: tuple[int, ...]
    name: str
    other: str
    things: str

    @property
    def calculation(self) -> tuple[Story, tuple[int, ...]]:
        """The story and its numbers, without names and things."""
        return self.story, self.numbers

    @property
    def question(self) -> str:
        """The problem in words."""
        numbers = dict(zip("abc", self.numbers, strict=False))
        return self.story.question.format(name=self.name, other=self.other, things=self.things, **numbers)

    @property
    def solution(self) -> str:
        """The worked steps and then ``#### answer``, in the form of GSM8K."""
        results = _running_results(self.story, self.numbers)
        steps = [
            f"{before}{operation}{number}={after}"
            for before, operation, number, after in zip(
                results, self.story.operations, self.numbers[1:], results[1:], strict=False
            )
        ]
        thought = steps[0] if len(steps) == 1 else f"First {steps[0]}. Then {steps[1]}"
        return f"{thought}.\n#### {results[-1]}"


def make_problems(*, num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Returns training and held-out problems; equal arguments give equal problems.

    No question occurs twice, and no held-out calculation (a story with its numbers) occurs in training.
    """
    generator = random.Random(seed)
    heldout: dict[tuple[Story, tuple[int, ...]], Problem] = {}
    while len(heldout) < num_heldout:
        problem = _draw_problem(generator)
        heldout[problem.calculation] = problem
    train: dict[str, Problem] = {}
    while len(train) < num_train:
        problem = _draw_problem(generator)
        if problem.calculation not in heldout:
            train[problem.question] = problem
    return list(train.values()), list(heldout.values())


def write_arithmetic(output_dir: str | Path, *, num_train: int = 6400, num_heldout: int = 320, seed: int = 0) -> None:
    """Writes ``train.jsonl`` and ``heldout.jsonl``: rows of prompt, response and ground_truth in r1_zero form.

    Equal arguments give equal bytes. Files with these names are replaced, each as a whole.
    """
    train, heldout = make_problems(num_train=num_train, num_heldout=num_heldout, seed=seed)
    for name, problems in (("train", train), ("heldout", heldout)):
        rows = (R1Zero().render({"question": p.question, "answer": p.solution}) for p in problems)
        with write_atomically(Path(output_dir) / f"{name}.jsonl", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _draw_problem(generator: random.Random) -> Problem:
    story = generator.choice(STORIES)
    numbers = _draw_numbers(generator, story)
    name, other = generator.sample(NAMES.split(), 2)
    return Problem(story, numbers, name, other, generator.choice(THINGS.split()))


def _draw_numbers(generator: random.Random, story: Story) -> tuple[int, ...]:
    """Returns numbers from 2 to 20, or to 9 in a story that multiplies; every intermediate result is at least 1."""
    largest = 9 if "*" in story.operations else 20
    while True:
        numbers = tuple(generator.randint(2, largest) for _ in range(len(story.operations) + 1))
        if min(_running_results(story, numbers)) >= 1:
            return numbers


def _running_results(story: Story, numbers: tuple[int, ...]) -> list[int]:
    results = [numbers[0]]
    for operation, number in zip(story.operations, numbers[1:], strict=True):
        results.append(_APPLY[operation](results[-1], number))
    return results
