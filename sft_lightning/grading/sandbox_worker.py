"""The program of a process that runs somebody's grader, which may hang, crash and print.

Started by ``isolated_grading`` as a script. Standard input holds pickles from there, which is the same program on the
same machine and no data: ``(sys.path, the pickled grader)``, then ``(row, response, ground truth, time limit in
seconds)`` for each response. Each is answered by one line of JSON: ``{"grade": {...}}``, or ``{"error": message}``.
"""

import json
import os
import pickle
import signal
import sys
from dataclasses import asdict
from typing import Any


def main() -> None:
    tasks = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")

    def reply(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=replies, flush=True)

    # What the grader prints is for the user to see, and it reads nothing.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Schedulers send these to all processes of a job; the one that this works for decides what becomes of it.
    for each in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    sys.path[:], pickled = pickle.load(tasks)
    try:
        grader = pickle.loads(pickled)
        # Found by the path that was just set.
        from sft_lightning.errors import UserError
        from sft_lightning.grading.base import grade_row
    except Exception as error:
        return reply({"error": " ".join(f"{type(error).__name__}: {error}".split())})
    reply({})
    while True:
        try:
            row, response, ground_truth, time_limit_seconds = pickle.load(tasks)
        except EOFError:
            return None
        # The program that waits has a clock too; this one still runs when that program is gone.
        signal.setitimer(signal.ITIMER_REAL, time_limit_seconds)
        content: dict[str, Any]
        try:
            content = {"grade": asdict(grade_row(grader, row, response, ground_truth))}
        except UserError as error:
            content = {"error": str(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(content)


if __name__ == "__main__":
    main()
