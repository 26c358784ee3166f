"""Evaluate a model: generate answers to prompts, grade them, and count."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.errors import UserError
from sft_lightning.evaluation.result import EvaluationResult
from sft_lightning.generation.base import Generation, Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.grading.graders import Grade, Grader, R1ZeroGrader, grade_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Sample s of prompt p is answer number s * 2**32 + p of the evaluation, regardless of the numbers of both.
_MAX_PROMPTS = 2**32


def evaluate(
    model: "PreTrainedModel | None",
    prompts: Sequence[str],
    ground_truths: Sequence[Any],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generator: Generator | None = None,
    grader: Grader | None = None,
    num_samples: int = 1,
    indices: Sequence[int] | None = None,
    output_dir: str | Path | None = None,
) -> EvaluationResult:
    """Returns the graded answers of a model to prompts.

    Args:
        model: A causal language model. Its mode and the random state are unchanged afterwards. None for a generator
            that asks a server.
        prompts: Complete prompts, without further rendering.
        ground_truths: One for each prompt: a text, a number or a list of alternatives.
        tokenizer: None loads the one in the folder of the model.
        generator: None takes ``TransformersGenerator()``.
        grader: None takes ``R1ZeroGrader()``.
        num_samples: Answers per prompt; with several the metrics have ``pass_at`` and ``maj_at``.
        indices: Index of each prompt in the whole evaluation, if this is a part of one; None means 0, 1, 2, ... A
            sampled answer depends only on it, on the prompt and on the seed of the generator.
        output_dir: Folder for ``predictions.jsonl`` and ``metrics.json``. Earlier files are replaced.

    Raises:
        UserError: If the numbers of ground truths and prompts differ, a ground truth is missing, no tokenizer is
            found, or ``num_samples`` is below 1.
    """
    if len(prompts) != len(ground_truths):
        raise UserError(f"got {len(prompts)} prompts and {len(ground_truths)} ground_truths; give one for each")
    for index, ground_truth in enumerate(ground_truths):
        if ground_truth is None:
            raise UserError(f"prompt {index} has no ground_truth to grade its answer by")
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1, got {num_samples}")
    if tokenizer is None and model is not None:
        tokenizer = _tokenizer_of(model)
    if indices is None:
        indices = range(len(prompts))
    asked = [(row, sample) for row in range(len(prompts)) for sample in range(num_samples)]
    generations = (generator or TransformersGenerator()).generate(
        model,
        tokenizer,
        [prompts[row] for row, _ in asked],
        numbers=[sample * _MAX_PROMPTS + indices[row] for row, sample in asked],
    )
    responses = [generation.text for generation in generations]
    truths = [ground_truths[row] for row, _ in asked]
    grades = grade_all(grader or R1ZeroGrader(), responses, truths)
    result = EvaluationResult()
    for (row, sample), generation, grade in zip(asked, generations, grades, strict=True):
        head = {"index": indices[row], "sample": sample, "prompt": prompts[row]}
        result.samples.append(head | _graded(ground_truths[row], generation, grade))
    if output_dir is not None:
        result.write(output_dir)
    return result


def _tokenizer_of(model: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    path = model.config._name_or_path
    if not path:
        raise UserError("the model was not loaded from a folder that could hold a tokenizer; give tokenizer=")
    return load_tokenizer(path)


def _graded(ground_truth: Any, generation: Generation, grade: Grade) -> dict[str, Any]:
    cut = generation.stop_reason == "length" and not grade.format_correct
    return {
        "response": generation.text,
        "ground_truth": ground_truth,
        "format_correct": grade.format_correct,
        "strict_format_correct": grade.strict_format_correct,
        "answer_correct": grade.answer_correct,
        "answer": grade.answer,
        "failure": "cut_at_limit" if cut else grade.failure,
        "timed_out": grade.timed_out,
        "stop_reason": generation.stop_reason,
        "num_tokens": generation.num_tokens,
        "mean_entropy": generation.mean_entropy,
    }
