"""The program of a grading process: mathematics on text that anyone may have written, where it can do no harm.

Started by ``grading_pool`` as a script, so that it imports math-verify and nothing of the program that it works for.
Each line of stdin is a JSON list ``[answer, truth, time limit in seconds]``, each line of stdout ``true`` or ``false``.
A task over its time limit kills the process with SIGALRM, whatever it is busy with and whoever still waits for it.
"""

import contextlib
import json
import os
import resource
import signal
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

_MEMORY_LIMIT_BYTES = 2 * 1024**3
# The whole answer is the expression: nothing of it may be dropped as a unit.
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
    # Where the system refuses a limit, the time limit still stands.
    for limit, size in ((resource.RLIMIT_AS, _MEMORY_LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (size, resource.getrlimit(limit)[1]))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    print("ready", file=replies, flush=True)
    # The parsers print warnings as they go.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    # Both are inherited, and either could save a task from its time limit.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Schedulers send these to all processes of a job; the one that this works for decides what becomes of it.
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    while line := sys.stdin.readline():
        answer, truth, time_limit_seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit_seconds)
        verdict = are_equal(answer, truth)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(bool(verdict)), file=replies, flush=True)


if __name__ == "__main__":
    main()
