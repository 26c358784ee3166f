import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sft_lightning.errors import UserError
from sft_lightning.grading import sandbox
from sft_lightning.grading.graders import Grade, grade_all

# A module of a user. The response decides the behavior of the grader.
GRADERS = """
import ctypes, os, re, signal, subprocess, sys, time
from pathlib import Path
from sft_lightning.grading.graders import Grade, Grader

class Mine:
    def __init__(self, offset=0, time_limit_seconds=30.0):
        self.offset = offset
        self.time_limit_seconds = time_limit_seconds

    def grade(self, response, ground_truth):
        match response:
            case "sleep": time.sleep(60)
            case "backtrack": re.fullmatch("(a+)+b", "a" * 60)
            case "alarm off":
                signal.alarm(0)
                time.sleep(60)
            case "exit": sys.exit(3)
            case "kill": os.kill(os.getpid(), 9)
            case "segfault": ctypes.string_at(0)
            case "bug": return 1 / 0
            case "forever deeper": return self.grade(response, ground_truth)
            case "no grade": return 1.0
            case "print": print("printed by the grader")
            case "read": assert sys.stdin.read() == ""
            case "child":
                child = subprocess.Popen(["sleep", "60"])
                Path(ground_truth).write_text(str(child.pid))
                time.sleep(60)
            case "pid": return Grade(True, True, failure=str(os.getpid()))
        return Grade(True, len(response) + self.offset == ground_truth, strict_format_correct=False)

class Inherits(Grader):
    time_limit_seconds = 0.5

    def grade(self, response, ground_truth):
        time.sleep(60 * (response == "sleep"))
        return Grade(True, True)
"""


@pytest.fixture
def graders(tmp_path, monkeypatch):
    """Imports that module, as somebody's script would."""
    (tmp_path / "somebodys_graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("somebodys_graders")
    del sys.modules["somebodys_graders"]


RIGHT = Grade(True, True, strict_format_correct=False)
WRONG = Grade(True, False, strict_format_correct=False)
TIMED_OUT = Grade(False, False, failure="timed_out", timed_out=True)
CRASHED = Grade(False, False, failure="crashed")


def test_responses_are_graded_in_order_in_a_few_processes(graders, started):
    responses = ["a" * length for length in range(40)]
    assert grade_all(graders.Mine(offset=1), responses, [20] * 40, num_workers=2) == [
        RIGHT if length == 19 else WRONG for length in range(40)
    ]
    assert 1 <= len(started) <= 2
    assert grade_all(graders.Mine(), [], []) == []
    assert len(started) <= 2


def test_time_outs_and_crashes_are_survived_and_counted(graders, started, note_fault):
    responses = ["a", "exit", "sleep", "aa", "kill", "backtrack", "alarm off", "segfault", "aa", "forever deeper"]
    before = time.perf_counter()
    grades = grade_all(graders.Mine(time_limit_seconds=0.5), responses, [2] * 10, num_workers=2)
    assert grades == [WRONG, CRASHED, TIMED_OUT, RIGHT, CRASHED, TIMED_OUT, TIMED_OUT, CRASHED, RIGHT, CRASHED]
    assert time.perf_counter() - before < 40  # of 180 seconds asleep, and a regular expression for a million years
    note_fault(
        "grader that hangs or crashes",
        provoked="sleep, a regular expression without end, exit, SIGKILL, a segmentation fault and a stack overflow in "
        "a grader's process",
        outcome="the answer counts as wrong, and as timed out or crashed; the others are graded",
        tries=7,
    )


def test_the_time_limit_of_a_class_counts(graders, started):
    grades = grade_all(graders.Inherits(), ["sleep", "a"], [1, 1], num_workers=1)
    assert grades == [TIMED_OUT, Grade(True, True)]


@pytest.mark.parametrize("response", ["bug", "no grade"])
def test_an_exception_of_a_grader_is_raised(graders, started, response):
    message = {"bug": r"failed on row 1: ZeroDivisionError: division by zero \(somebodys_graders.py, line 2\d\)"}
    message["no grade"] = "returned a float for row 1; it must return a Grade"
    with pytest.raises(UserError, match=rf"^grader somebodys_graders\.Mine {message[response]}$"):
        grade_all(graders.Mine(), ["a", response, "sleep", "sleep"], [1] * 4, num_workers=2)


def test_child_processes_of_a_grader_end_with_it(graders, started, tmp_path):
    grades = grade_all(graders.Mine(time_limit_seconds=1.0), ["child"], [str(tmp_path / "pid")])
    assert grades == [TIMED_OUT]
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives")


def test_a_grader_prints_to_stderr_and_reads_nothing(graders, started, capfd):
    assert grade_all(graders.Mine(), ["print", "read"], [5, 4]) == [RIGHT, RIGHT]
    assert capfd.readouterr() == ("", "printed by the grader\n")


def test_surrogates_and_long_texts_reach_the_grader(graders, started):
    responses = ["\ud800\x00\n", "a" * 3_000_000]
    assert grade_all(graders.Mine(), responses, [3, 3_000_000]) == [RIGHT, RIGHT]


def test_a_grader_that_cannot_be_pickled_runs_here(started, caplog):
    class Local:
        def grade(self, response, ground_truth):
            return Grade(True, True, failure=str(os.getpid()))

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            grades = grade_all(Local(), ["a", "b"], [1, 2])
    assert [grade.failure for grade in grades] == [str(os.getpid())] * 2
    assert started == []
    (line,) = caplog.messages
    assert line.startswith("grader test_a_grader_that_cannot_be_pickled_runs_here.<locals>.Local runs in")
    assert "\n" not in line


def test_a_grader_that_cannot_be_imported_runs_here(graders, started, caplog, tmp_path):
    (tmp_path / "somebodys_graders.py").write_text("raise OSError('no rubric')")
    sandbox._warn_once.cache_clear()
    assert grade_all(graders.Mine(), ["a", "pid"], [1, 1])[1].failure == str(os.getpid())
    assert len(started) == 1
    assert caplog.messages == [
        "grader Mine runs in this process and without a time limit: another process cannot load it (OSError: no rubric)"
    ]
    with pytest.raises(UserError, match="row 1: ZeroDivisionError"):
        grade_all(graders.Mine(), ["a", "bug"], [1, 1])


def test_an_interrupt_does_not_wait_for_the_grader(graders, started):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(3.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            grade_all(graders.Mine(), ["sleep"] * 4, [1] * 4, num_workers=2)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert time.perf_counter() - start < 25


def test_a_script_without_main_guard_can_define_its_grader(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        print("script runs")
        from sft_lightning.grading.graders import Grade, grade_all
        class Mine:
            def grade(self, response, ground_truth):
                return Grade(True, response == ground_truth)
        print([grade.answer_correct for grade in grade_all(Mine(), ["a", "b"], ["a", "a"])])
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "script runs\n[True, False]\n"
    assert done.stderr.startswith("grader Mine runs in this process and without a time limit")
