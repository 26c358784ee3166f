"""Define the record, and the template that renders one from a row of a data file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sft_lightning.system.identity import identity_with_code, is_built_in, public_name


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt and its response.

    Attributes:
        prompt: The text before the response; not empty.
        response: The text that the model is trained to write; not empty.
        ground_truth: What an answer is graded against: a string, a number, a list of those, or None.
        weight: Multiplies the row's loss; finite, at least 0.
        source: ``file:line``, counted from 1. In a Parquet file, the row number takes the place of the line number.
    """

    prompt: str
    response: str
    ground_truth: Any = None
    weight: float = 1.0
    source: str = ""


class Template(ABC):
    """Renders a row of a data file as prompt and response.

    Attributes:
        required_keys: Fields that a row must have, as text that is not empty.
        version: Part of the token cache's key. Raise it whenever a change of the class changes rendered rows, so that
            tokens cached before the change are not used.
    """

    required_keys: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1

    @abstractmethod
    def render(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns ``prompt`` and ``response`` and, where the row has them, ``ground_truth`` and ``weight``.

        Args:
            row: The row's fields. All ``required_keys`` are present and are text that is not empty.

        Raises:
            ValueError: If the row cannot be rendered. The message gives the reason; the caller adds file and line.
        """

    @property
    def identity(self) -> str:
        """Text that differs between instances of one class that render rows differently.

        Attributes and the class's source file are seen without it; this is for what they do not show, such as the
        content of a file that is read.
        """
        return ""


def template_identity(template: Template) -> str:
    """Returns a stable identity of a template's output, for the token cache's key and for checks on resume.

    It holds the class's public name and version, and a digest of the instance's ``identity`` if that is not empty. For
    a class outside of the package, the digest is also of its attributes and its source file.

    Example:
        >>> from sft_lightning import Plain
        >>> template_identity(Plain())
        'sft_lightning.Plain/1'
    """
    cls = type(template)
    text = template.identity + ("" if is_built_in(cls) else identity_with_code(template))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{public_name(cls)}/{template.version}" + (f":{digest}" if text else "")
