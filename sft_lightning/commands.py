"""The commands that need no Trainer: prepare and evaluate. Called by cli.py, which parses their options."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sft_lightning.data.records import read_records
from sft_lightning.data.templates import R1Zero, Template, template_named
from sft_lightning.errors import UserError
from sft_lightning.evaluation.evaluate import EvaluationResult


def prepare_gsm8k(input_path: str, output_path: str, *, template_path: str | None = None) -> int:
    """Writes GSM8K rows in r1_zero form, one JSON object a line. Returns how many.

    Raises:
        UserError: If a row is no GSM8K row; nothing is left of the output then.
    """
    num_rows = 0
    with _written_whole(Path(output_path)) as file:
        for record in read_records(input_path, template=R1Zero(template_path)):
            row = {"prompt": record.prompt, "response": record.response, "ground_truth": record.ground_truth}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def evaluate_model(
    *,
    model: str,
    data: str,
    output: str,
    template: str,
    num_examples: int | None,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    seed: int,
    grader: str,
    batch_tokens: int,
) -> EvaluationResult:
    """Returns how well a model folder answers the prompts of a data file; writes samples and metrics to ``output``."""
    import torch

    from sft_lightning.data.tokenization import load_tokenizer
    from sft_lightning.evaluation.evaluate import evaluate
    from sft_lightning.evaluation.generation import TransformersGenerator
    from sft_lightning.evaluation.grading import R1ZeroGrader
    from sft_lightning.modeling import hide_progress_bars, load_model

    if num_examples is not None and num_examples < 1:
        raise UserError(f"--num_examples must be at least 1, got {num_examples}")
    hide_progress_bars()
    generator = TransformersGenerator(
        max_new_tokens=max_new_tokens, temperature=temperature, greedy=greedy, batch_tokens=batch_tokens, seed=seed
    )
    chosen: Template | None = None if template == "auto" else template_named(template)
    records = [record for record in read_records(data, template=chosen) if record.ground_truth is not None]
    records = records[:num_examples]
    if not records:
        raise UserError(f"--data '{data}' has no row with a ground_truth to grade answers by")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    loaded = load_model(
        model, dtype=torch.bfloat16 if on_gpu else torch.float32, device_type=device.type, half_precision=on_gpu
    )
    loaded.to(device)  # type: ignore[arg-type]
    return evaluate(
        loaded,
        [record.prompt for record in records],
        [record.ground_truth for record in records],
        tokenizer=load_tokenizer(model),
        generator=generator,
        grader={"R1ZeroGrader": R1ZeroGrader}[grader](),
        output_dir=output,
    )


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
