"""Run a user's grader, which may hang, crash and print, as the program of a grading process.

``sandbox`` starts it as a script. Standard input holds pickles from there, which is the same program on the same
machine: first ``(sys.path, the pickled grader)``, then ``(row, response, ground truth, time limit in seconds)`` for
each response. Each is answered by one line of JSON: ``{"grade": {...}}`` or ``{"error": message}``.
"""

import json
import pickle
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    # A script that -P started finds neither its own folder nor, before the first task, the package.
    worker_process = runpy.run_path(str(Path(__file__).with_name("worker_process.py")))
    tasks, reply = worker_process["open_streams"]()
    sys.path[:], pickled = pickle.load(tasks)
    try:
        grader = pickle.loads(pickled)
        from sft_lightning.errors import UserError
        from sft_lightning.grading.base import grade_row
    except Exception as error:
        reply(json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())}))
        return
    reply("{}")
    while True:
        try:
            row, response, ground_truth, seconds = pickle.load(tasks)
        except EOFError:
            return
        content: dict[str, Any]
        with worker_process["time_limit"](seconds):
            try:
                content = {"grade": asdict(grade_row(grader, row, response, ground_truth))}
            except UserError as error:
                content = {"error": str(error)}
        reply(json.dumps(content))


if __name__ == "__main__":
    main()
