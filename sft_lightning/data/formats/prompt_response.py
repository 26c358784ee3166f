"""Render rows that already hold a prompt and a response."""

from collections.abc import Mapping
from typing import Any

from sft_lightning.data.formats.base import Template


class Plain(Template):
    """Takes prompt and response from the row unchanged.

    Example:
        >>> Plain().render({"prompt": "2+2=", "response": "4"})
        {'prompt': '2+2=', 'response': '4'}
    """

    required_keys = ("prompt", "response")

    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        optional = {key: row[key] for key in ("ground_truth", "weight") if row.get(key) is not None}
        return {"prompt": row["prompt"], "response": row["response"], **optional}
