"""Evaluation: prompts -> generate -> grade -> counts and samples. Strings in, files out."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.errors import UserError
from sft_lightning.evaluation.generation import Generation, Generator, TransformersGenerator
from sft_lightning.evaluation.grading import Grade, Grader, R1ZeroGrader, grade_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class EvaluationResult:
    """What an evaluation found. Everything follows from the samples: results of parts add up by joining those.

    Attributes:
        samples: One row for each prompt, in order: ``prompt, response, ground_truth, format_correct, answer_correct,
            failure, timed_out, stop_reason, num_tokens``.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_examples(self) -> int:
        return len(self.samples)

    @property
    def num_format_correct(self) -> int:
        return sum(sample["format_correct"] for sample in self.samples)

    @property
    def num_answer_correct(self) -> int:
        return sum(sample["answer_correct"] for sample in self.samples)

    @property
    def num_rewarded(self) -> int:
        """How many are right in format and answer."""
        return sum(sample["format_correct"] and sample["answer_correct"] for sample in self.samples)

    @property
    def num_timed_out(self) -> int:
        return sum(sample["timed_out"] for sample in self.samples)

    @property
    def format_accuracy(self) -> float:
        """In [0, 1]; 0 without examples, like the other rates."""
        return self.num_format_correct / max(1, self.num_examples)

    @property
    def answer_accuracy(self) -> float:
        return self.num_answer_correct / max(1, self.num_examples)

    @property
    def mean_reward(self) -> float:
        return self.num_rewarded / max(1, self.num_examples)

    @property
    def stop_reasons(self) -> dict[str, int]:
        """Why answers ended -> how many."""
        return self._count("stop_reason")

    @property
    def failures(self) -> dict[str, int]:
        """Kind of failure -> how many."""
        return self._count("failure")

    def metrics(self) -> dict[str, Any]:
        """Returns what ``metrics.json`` holds."""
        names = (
            "num_examples num_format_correct num_answer_correct num_rewarded num_timed_out "
            "format_accuracy answer_accuracy mean_reward stop_reasons failures"
        )
        return {name: getattr(self, name) for name in names.split()}

    def write(self, output_dir: str | Path) -> None:
        """Writes ``predictions.jsonl``, one sample a line, and ``metrics.json``, each in one piece."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples]
        _write(folder / "predictions.jsonl", "".join(lines))
        _write(folder / "metrics.json", json.dumps(self.metrics(), indent=2) + "\n")

    def _count(self, key: str) -> dict[str, int]:
        counts = Counter(sample[key] for sample in self.samples if sample[key] is not None)
        return dict(sorted(counts.items()))


def evaluate(
    model: "PreTrainedModel",
    prompts: Sequence[str],
    ground_truths: Sequence[Any],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generator: Generator | None = None,
    grader: Grader | None = None,
    output_dir: str | Path | None = None,
) -> EvaluationResult:
    """Returns how well the model answers the prompts.

    Args:
        model: A causal language model. Its mode and the random state are left as they were.
        prompts: Given to the model as they are.
        ground_truths: One for each prompt: a text, a number or a list of those that are all right.
        tokenizer: None takes the one in the folder that the model was loaded from.
        generator: None takes ``TransformersGenerator()``.
        grader: None takes ``R1ZeroGrader()``.
        output_dir: Where ``predictions.jsonl`` and ``metrics.json`` are written, over those of an earlier evaluation.

    Raises:
        UserError: If there are not as many ground truths as prompts, one is missing, or no tokenizer is found.
    """
    if len(prompts) != len(ground_truths):
        raise UserError(f"got {len(prompts)} prompts and {len(ground_truths)} ground_truths; give one for each")
    for index, ground_truth in enumerate(ground_truths):
        if ground_truth is None:
            raise UserError(f"prompt {index} has no ground_truth to grade its answer by")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    generations = (generator or TransformersGenerator()).generate(model, tokenizer, prompts)
    responses = [generation.text for generation in generations]
    grades = grade_all(grader or R1ZeroGrader(), responses, ground_truths)
    rows = zip(prompts, ground_truths, generations, grades, strict=True)
    result = EvaluationResult([_sample(*row) for row in rows])
    if output_dir is not None:
        result.write(output_dir)
    return result


def _tokenizer_of(model: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    path = model.config._name_or_path
    if not path:
        raise UserError("the model was not loaded from a folder that could hold a tokenizer; give tokenizer=")
    return load_tokenizer(path)


def _sample(prompt: str, ground_truth: Any, generation: Generation, grade: Grade) -> dict[str, Any]:
    cut = generation.stop_reason == "length" and not grade.format_correct
    return {
        "prompt": prompt,
        "response": generation.text,
        "ground_truth": ground_truth,
        "format_correct": grade.format_correct,
        "answer_correct": grade.answer_correct,
        "failure": "cut_at_limit" if cut else grade.failure,
        "timed_out": grade.timed_out,
        "stop_reason": generation.stop_reason,
        "num_tokens": generation.num_tokens,
    }


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    # A lone surrogate is no UTF-8; as a backslash escape it is valid JSON.
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)
