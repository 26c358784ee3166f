import json
import pickle
import signal
import subprocess
import sys
import time

import pytest

from sft_lightning.grading import sandbox_worker
from sft_lightning.grading.graders import ExactMatchGrader

GRADER = """
import time
from sft_lightning.grading.base import Grade
class Slow:
    def grade(self, response, ground_truth):
        time.sleep(response)
        return Grade(True, True)
"""


@pytest.fixture
def worker():
    process = subprocess.Popen(
        [sys.executable, "-P", sandbox_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate()


def give(process, *tasks):
    for task in tasks:
        pickle.dump(task, process.stdin)
    process.stdin.flush()


def test_each_task_gets_one_line_until_end_of_input(worker):
    give(
        worker,
        (sys.path, pickle.dumps(ExactMatchGrader())),
        (0, "a", "a", 5.0),
        (1, "a", "b", 5.0),
        (2, "a", None, 5.0),
    )
    replies, errors = worker.communicate(timeout=60)
    grade = {"format_correct": True, "timed_out": False, "strict_format_correct": None, "answer": "a"}
    assert [json.loads(line) for line in replies.splitlines()] == [
        {},
        {"grade": {**grade, "answer_correct": True, "failure": None}},
        {"grade": {**grade, "answer_correct": False, "failure": "wrong"}},
        {"error": "ground_truth None must be a text, a number or a list of those, and not empty"},
    ]
    assert errors == b""
    assert worker.returncode == 0


def test_a_grader_that_cannot_be_imported_is_one_line(worker):
    give(worker, (sys.path, pickle.dumps(ExactMatchGrader()).replace(b"ExactMatchGrader", b"ExactMatchGradex")))
    reply = json.loads(worker.stdout.readline())
    assert reply["error"].startswith("AttributeError: ")
    assert "ExactMatchGradex" in reply["error"]
    assert worker.wait(10) == 0


def test_the_worker_dies_at_its_time_limit_without_a_caller(worker, tmp_path, monkeypatch):
    (tmp_path / "slow_grader.py").write_text(GRADER)
    monkeypatch.syspath_prepend(tmp_path)
    import slow_grader

    give(worker, (sys.path, pickle.dumps(slow_grader.Slow())), (0, 0.01, None, 0.3))
    assert json.loads(worker.stdout.readline()) == {}
    assert json.loads(worker.stdout.readline())["grade"]["answer_correct"]
    time.sleep(0.5)  # the limit counts no longer
    assert worker.poll() is None
    give(worker, (1, 60, None, 0.3))
    worker.stdin.close()
    assert worker.wait(20) == -signal.SIGALRM
    worker.stdin = None  # closed: communicate() must not flush it


def test_signals_of_schedulers_do_not_end_the_worker(worker):
    give(worker, (sys.path, pickle.dumps(ExactMatchGrader())))
    assert json.loads(worker.stdout.readline()) == {}
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGUSR1)
    give(worker, (0, "a", "a", 5.0))
    assert json.loads(worker.stdout.readline())["grade"]["answer_correct"]
