"""Log tables of generated and graded answers to TensorBoard and W&B."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

# TensorBoard keeps the texts of every evaluation in one file and shows all of them on one page.
_MOST_TENSORBOARD_ROWS = 20
_MOST_TENSORBOARD_CHARACTERS = 600
# More rows make the W&B page slow; predictions.jsonl has all of them.
_MOST_WANDB_ROWS = 1000
_COLUMNS = ("index", "prompt", "response", "ground_truth", "grade", "failure", "num_tokens")
# Printable ASCII without a meaning in a table cell of Markdown or HTML.
_PLAIN_PUNCTUATION = set(" .,;:?'\"=+-/%$()")


def log_samples(loggers: Sequence[Logger], name: str, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Logs samples to the loggers that support tables: TensorBoard and W&B. Call it on one rank.

    Args:
        loggers: Loggers of the Trainer; other kinds are skipped.
        name: Name of the table, e.g. ``val/samples``.
        samples: Rows of ``predictions.jsonl``. TensorBoard gets up to 20 of them, right and wrong, W&B the first
            thousand.
        step: Completed optimizer steps.
    """
    if not samples:
        return
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(choose(samples, _MOST_TENSORBOARD_ROWS)), global_step=step)
        elif isinstance(logger, WandbLogger):
            rows = [list(_cells(sample)) for sample in samples[:_MOST_WANDB_ROWS]]
            logger.log_table(name, columns=list(_COLUMNS), data=rows, step=step)


def choose(samples: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Returns at most ``most`` samples in their order, half of them wrong and half right if there are enough.

    They are spaced evenly within each kind, so the same grades give the same choice.
    """
    right = [place for place, sample in enumerate(samples) if _is_right(sample)]
    wrong = [place for place, sample in enumerate(samples) if not _is_right(sample)]
    num_wrong = min(len(wrong), max(most // 2, most - len(right)))
    places = [*_evenly(wrong, num_wrong), *_evenly(right, most - num_wrong)]
    return [samples[place] for place in sorted(places)]


def markdown_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Returns the samples as a Markdown table, one per line. Markdown and HTML in a text are escaped."""
    lines = [" | ".join(name.replace("_", " ") for name in _COLUMNS), " | ".join(["---"] * len(_COLUMNS))]
    lines += [" | ".join(_escape(_shorten(str(cell))) for cell in _cells(sample)) for sample in samples]
    return "\n".join(f"| {line} |" for line in lines)


def _is_right(sample: Mapping[str, Any]) -> bool:
    return bool(sample["format_correct"] and sample["answer_correct"])


def _evenly(places: Sequence[int], number: int) -> list[int]:
    number = min(number, len(places))
    return [places[index * len(places) // number] for index in range(number)]


def _cells(sample: Mapping[str, Any]) -> tuple[int, str, str, str, str, str, int]:
    """Returns the values of ``_COLUMNS``. Each has one type, as a W&B table requires."""
    return (
        int(sample.get("index", 0)),
        _encodable(sample["prompt"]),
        _encodable(sample["response"]),
        _encodable(str(sample["ground_truth"])),
        "right" if _is_right(sample) else "wrong",
        sample["failure"] or "",
        int(sample["num_tokens"]),
    )


def _encodable(text: str) -> str:
    """Returns the text with lone surrogates escaped: a JSON file may contain them, UTF-8 may not."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _shorten(text: str) -> str:
    """Returns the text, or its beginning and end if it is long: a prompt ends with the question."""
    if len(text) <= _MOST_TENSORBOARD_CHARACTERS:
        return text
    half = _MOST_TENSORBOARD_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def _escape(text: str) -> str:
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character == "\n":
        return "<br>"
    if character.isalnum() or character in _PLAIN_PUNCTUATION:
        return character
    if character.isprintable():
        return f"&#{ord(character)};"
    # HTML allows no control characters, not even as entities.
    return f"&#92;u{ord(character):04x}"
