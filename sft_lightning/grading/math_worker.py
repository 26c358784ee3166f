"""Decide whether expressions are equal, as the program of a grading process.

``math_processes`` starts it as a script, so that it imports math-verify and nothing of the calling program: a model
may have written anything. Each line of standard input is a JSON list ``[answer, truth, time limit in seconds]``, each
line of standard output ``true`` or ``false``. A task over its time limit kills the process with SIGALRM.
"""

import contextlib
import json
import os
import resource
import runpy
import sys
from pathlib import Path

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_MEMORY_LIMIT_BYTES = 2 * 1024**3
# The whole answer is the expression: no part of it may be dropped as a unit.
_WHOLE_ANSWER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
)


def are_equal(answer: str, truth: str) -> bool:
    """Returns whether two LaTeX expressions are mathematically equal, decimals to six places."""

    def read(text: str) -> list:
        return parse(f"${text}$", [_WHOLE_ANSWER], fallback_mode="no_fallback", parsing_timeout=None)

    return verify(read(truth), read(answer), timeout_seconds=None)


def main() -> None:
    # A script that -P started finds neither its own folder nor always the package on the import path.
    worker_process = runpy.run_path(str(Path(__file__).with_name("worker_process.py")))
    # Where the system refuses a limit, the time limit still holds.
    for limit, size in ((resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (size, resource.getrlimit(limit)[1]))
    tasks, reply = worker_process["open_streams"]()
    reply("ready")
    # The parsers print warnings.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    while line := tasks.readline():
        answer, truth, seconds = json.loads(line)
        with worker_process["time_limit"](seconds):
            verdict = are_equal(answer, truth)
        reply(json.dumps(bool(verdict)))


if __name__ == "__main__":
    main()
