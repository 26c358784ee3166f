"""Render GSM8K rows in r1_zero form, with the reasoning and the answer in tags."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_lightning.data.formats.base import Template
from sft_lightning.errors import UserError

# The fixed text around each question. The response begins inside the <think> tag.
R1_ZERO_PROMPT = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. The Assistant "
    "first thinks through the solution and then gives the User the answer. The thinking stands inside <think> and "
    "</think> tags and the answer inside <answer> and </answer> tags, like this: <think> the thinking goes here "
    "</think> <answer> the answer goes here </answer>.\n"
    "User: {question}\n"
    "Assistant: <think>"
)

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


class R1Zero(Template):
    r"""Renders a GSM8K row with the solution between ``<think>`` tags and the number between ``<answer>`` tags.

    Args:
        template_path: Text file to use instead of the built-in prompt, with ``{question}`` where the question goes.

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
        return self.prompt_text

    def render_prompt(self, question: str) -> str:
        """Returns the prompt of one question. The question is inserted literally: braces in it have no meaning."""
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
