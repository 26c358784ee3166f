"""Templates: one row of a data file -> the prompt and the response that the model is trained on."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from sft_lightning.errors import UserError

# The constant text before each question of the r1_zero form. The response begins inside the thought.
R1_ZERO_PROMPT = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. The Assistant "
    "first thinks through the solution and then gives the User the answer. The thinking stands inside <think> and "
    "</think> tags and the answer inside <answer> and </answer> tags, like this: <think> the thinking goes here "
    "</think> <answer> the answer goes here </answer>.\n"
    "User: {question}\n"
    "Assistant: <think>"
)

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class Template(ABC):
    """Turns one row of a data file into prompt and response."""

    required_keys: ClassVar[tuple[str, ...]]

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns ``prompt`` and ``response`` and, where the row has them, ``ground_truth`` and ``weight``.

        Args:
            row: The row's fields. Every one of ``required_keys`` is there and is a non-empty string.

        Raises:
            ValueError: If the row cannot be rendered; the message says why, the caller adds file and line.
        """

    @property
    def identity(self) -> str:
        """Text that changes whenever rendered rows would: it is part of the token cache's key."""
        return type(self).__name__


class Plain(Template):
    """Prompt and response as they stand in the row.

    Example:
        >>> Plain().render({"prompt": "2+2=", "response": "4"})
        {'prompt': '2+2=', 'response': '4'}
    """

    required_keys = ("prompt", "response")

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        optional = {key: row[key] for key in ("ground_truth", "weight") if row.get(key) is not None}
        return {"prompt": row["prompt"], "response": row["response"], **optional}


class R1Zero(Template):
    r"""A GSM8K row in r1_zero form: thought between ``<think>`` tags, the number between ``<answer>`` tags.

    Args:
        template_path: Text file with ``{question}`` where the question goes, instead of the built-in preamble.

    Example:
        >>> row = {"question": "What is 2+2?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}
        >>> R1Zero().render(row)["response"]
        ' 2+2 = 4 </think> <answer> 4 </answer>'
    """

    required_keys = ("question", "answer")

    def __init__(self, template_path: str | None = None) -> None:
        self.template_path = template_path
        self.prompt_text = R1_ZERO_PROMPT if template_path is None else _read_prompt_text(template_path)

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}:{self.prompt_text}"

    def render_prompt(self, question: str) -> str:
        """Returns the prompt of one question, which is put in literally: braces in it mean nothing."""
        return self.prompt_text.replace("{question}", question)

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        solution, mark, number = row["answer"].rpartition("####")
        number = number.strip().replace(",", "")
        if not mark or not number or not solution.strip():
            raise ValueError("field 'answer' must be a worked solution that ends with '#### <number>'")
        thought = _CALCULATOR_MARK.sub("", solution).strip()
        rendered = {
            "prompt": self.render_prompt(row["question"]),
            "response": f" {thought} </think> <answer> {number} </answer>",
            "ground_truth": number,
        }
        if row.get("weight") is not None:
            rendered["weight"] = row["weight"]
        return rendered


def template_for(keys: set[str]) -> Template:
    """Returns the template that ``auto`` takes for a file whose rows have these keys.

    Raises:
        UserError: If the keys fit no template; the message names the keys found and the mapping to set.
    """
    for template in (Plain, R1Zero):
        if set(template.required_keys) <= keys:
            return template()
    raise UserError(
        f"found the keys {sorted(keys)}, expected 'prompt' and 'response' or 'question' and 'answer'; "
        "map other names with data.columns, for example {prompt: instruction, response: output}"
    )


def template_named(name: str) -> Template:
    """Returns a template of this file by its class name. Raises UserError if there is none."""
    for template in (Plain, R1Zero):
        if template.__name__ == name:
            return template()
    raise UserError(f"template '{name}' is unknown; choose auto, Plain or R1Zero")


def _read_prompt_text(template_path: str) -> str:
    path = Path(template_path)
    if not path.is_file():
        raise UserError(f"template_path '{template_path}' is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"template_path '{template_path}' is not UTF-8: {error}") from None
    if "{question}" not in text:
        raise UserError(f"template_path '{template_path}' has no '{{question}}' in it, so every prompt would be alike")
    return text
