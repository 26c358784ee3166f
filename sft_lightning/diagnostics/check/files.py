"""Data files as bytes: line ends and byte-order marks, which are read over here but not by every other tool."""

import codecs
from collections.abc import Sequence
from pathlib import Path

from sft_lightning.diagnostics.check.findings import Finding, Place, counted


def check_files(set_name: str, files: Sequence[Path]) -> list[Finding]:
    """Returns what is unusual about the JSONL files of a set; Parquet has no lines.

    Args:
        set_name: ``train`` or ``val``.
        files: As ``resolve_files`` returns them.
    """
    marks, line_ends, num_lines = [], [], 0
    for file in files:
        if file.suffix == ".parquet":
            continue
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                num_lines += 1
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    marks.append(Place(f"{file}:1"))
                if line.endswith(b"\r\n"):
                    line_ends.append(Place(f"{file}:{number}"))
    findings = []
    if marks:
        findings.append(
            Finding(
                "byte_order_mark",
                "info",
                f"{set_name}: {counted(len(marks), 'file begins', 'files begin')} with a byte-order mark, which is "
                "read over",
                "save as UTF-8 without BOM: other readers take it for a part of the first key",
                len(marks),
                marks,
            )
        )
    if line_ends:
        findings.append(
            Finding(
                "crlf_line_ends",
                "info",
                f"{set_name}: {len(line_ends):,} of {counted(num_lines, 'line')} end with CRLF, which is read over",
                "harmless here; dos2unix makes them LF",
                len(line_ends),
                line_ends,
            )
        )
    return findings
