"""SHA-256 of files and of plain values, in hexadecimal."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def file_digest(file: Path) -> str:
    """Returns the digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_digest(files: Sequence[Path]) -> str:
    """Returns one digest for the bytes of several files, one behind the other."""
    return hashlib.sha256(b"".join(bytes.fromhex(file_digest(file)) for file in files)).hexdigest()


def value_digest(value: Any) -> str:
    """Returns the digest of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
