"""Find unusual line ends and byte-order marks in data files, which our reader accepts but other tools may not."""

import codecs
from collections.abc import Sequence
from pathlib import Path

from sft_lightning.data.sources.files import DataFile
from sft_lightning.diagnostics.check.findings import Finding, Place, counted


def check_files(set_name: str, files: Sequence[DataFile]) -> list[Finding]:
    """Returns findings about the JSONL files of a set; Parquet files have no lines.

    Args:
        set_name: ``train`` or ``val``.
        files: From ``resolve_files``.
    """
    marks, line_ends, num_lines = [], [], 0
    for file in files:
        if not isinstance(file, Path) or file.suffix == ".parquet":
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
                "skipped",
                "save as UTF-8 without BOM: other readers make it part of the first key",
                len(marks),
                marks,
            )
        )
    if line_ends:
        findings.append(
            Finding(
                "crlf_line_ends",
                "info",
                f"{set_name}: {len(line_ends):,} of {counted(num_lines, 'line')} end with CRLF, which is read as LF",
                "harmless here; dos2unix converts them to LF",
                len(line_ends),
                line_ends,
            )
        )
    return findings
