import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sft_lightning.grading import math_processes
from sft_lightning.grading.math_processes import Verdict, close_idle_workers, compare
from sft_lightning.grading.worker_process import WorkerProcess

REPOSITORY = Path(__file__).parents[2]

TOWER = "9^{9^{9^{9}}}"  # its digits would fill the universe


# Starts at once, takes texts for mathematics, and never answers to "hang".
PARROT = """
import json, sys, time
print("ready", flush=True)
for line in sys.stdin:
    answer, truth, _ = json.loads(line)
    time.sleep(60 * (answer == "hang"))
    print(json.dumps(answer == truth), flush=True)
"""


def program(monkeypatch, path, text):
    path.write_text(text)
    monkeypatch.setattr(math_processes, "_PROGRAM", path)


@pytest.fixture
def parrot(started, tmp_path, monkeypatch):
    program(monkeypatch, tmp_path / "parrot.py", PARROT)
    return started


def test_one_process_serves_many_answers_until_it_is_closed(started):
    verdicts = [compare(f"{n}/2", "0.5", 5.0) for n in range(4)]
    assert verdicts == [Verdict.DIFFERENT, Verdict.EQUAL, Verdict.DIFFERENT, Verdict.DIFFERENT]
    assert len(started) == 1
    close_idle_workers()
    assert started[0].returncode == -signal.SIGKILL
    close_idle_workers()  # none there
    assert compare("1/2", "0.5", 5.0) is Verdict.EQUAL
    assert len(started) == 2


def test_a_time_out_kills_the_process_and_it_is_replaced(started):
    before = time.perf_counter()
    assert compare(TOWER, "72", 0.5) is Verdict.TIMED_OUT
    assert 0.4 < time.perf_counter() - before < 5
    assert started[0].returncode == -signal.SIGALRM
    assert compare("1/2", "0.5", 5.0) is Verdict.EQUAL
    assert len(started) == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_process_is_a_crash_and_is_replaced(parrot, number):
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    with ThreadPoolExecutor(1) as threads:
        verdict = threads.submit(compare, "hang", "72", 30.0)
        while math_processes._idle_workers:
            time.sleep(0.01)
        time.sleep(0.1)
        parrot[0].send_signal(number)
        assert verdict.result(timeout=15) is Verdict.CRASHED
    assert parrot[0].returncode == -number
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    assert len(parrot) == 2


def test_a_process_killed_while_idle_is_replaced(parrot):
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    os.kill(parrot[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, parrot[0].pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    assert parrot[0].returncode == -signal.SIGKILL
    assert len(parrot) == 2


def test_a_death_after_the_alive_check_is_a_crash(parrot, monkeypatch):
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    monkeypatch.setattr(WorkerProcess, "is_alive", property(lambda worker: True))
    os.kill(parrot[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, parrot[0].pid, os.WEXITED | os.WNOWAIT)
    assert compare("same", "same", 5.0) is Verdict.CRASHED


@pytest.mark.parametrize("last_words", ["os.abort()", "raise SystemExit(0)", "os.kill(os.getpid(), 9)"])
def test_a_dying_program_is_a_crash(tmp_path, monkeypatch, started, last_words):
    program(monkeypatch, tmp_path / "crashing.py", f"import os\nprint('ready', flush=True)\ninput()\n{last_words}\n")
    assert compare("1/2", "0.5", 5.0) is Verdict.CRASHED
    assert math_processes._idle_workers == []


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "print('hello', flush=True)\ninput()", ""])
def test_a_process_start_failure_gives_no_verdict(tmp_path, monkeypatch, started, text):
    program(monkeypatch, tmp_path / "broken.py", text)
    with pytest.raises(RuntimeError, match=r"a grading process did not start: '.*broken\.py' says why"):
        compare("1/2", "0.5", 5.0)
    assert len(started) == 1
    assert started[0].returncode is not None


def test_an_interrupt_leaves_no_process_with_an_unread_reply(parrot):
    def interrupt(number, frame):
        raise KeyboardInterrupt

    assert compare("same", "same", 5.0) is Verdict.EQUAL
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            compare("hang", "72", 30.0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert parrot[0].returncode == -signal.SIGKILL
    assert math_processes._idle_workers == []
    assert compare("one", "other", 5.0) is Verdict.DIFFERENT


def test_threads_do_not_share_a_process(started):
    questions = [("1/2", "0.5"), (TOWER, "72"), ("1/3", "0.5"), ("2/4", "0.5")] * 2
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(lambda question: compare(*question, 1.0), questions))
    assert verdicts == [Verdict.EQUAL, Verdict.TIMED_OUT, Verdict.DIFFERENT, Verdict.EQUAL] * 2
    assert len(started) <= 2 + 2  # one a thread, and one after each that was killed


def test_closing_in_two_threads_at_once(parrot, monkeypatch):
    class TakenByAnother(list):
        """An idle worker that another thread takes right after it was seen."""

        def __len__(self):
            number = super().__len__()
            self.clear()
            return number

    compare("same", "same", 5.0)
    worker = math_processes._take_worker()
    monkeypatch.setattr(math_processes, "_idle_workers", TakenByAnother([worker]))
    close_idle_workers()
    worker.close()


def test_a_fork_starts_separate_processes(parrot):
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)
            is_right = not math_processes._idle_workers and compare("one", "other", 5.0) is Verdict.DIFFERENT
            close_idle_workers()
            os._exit(0 if is_right and len(parrot) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert parrot[0].poll() is None
    assert compare("same", "same", 5.0) is Verdict.EQUAL
    assert len(parrot) == 1


def test_a_process_has_a_separate_session(parrot):
    compare("same", "same", 5.0)
    assert os.getsid(parrot[0].pid) == parrot[0].pid  # a Ctrl-C on the terminal does not reach it


HOSTILE = [
    "10^{10^{10}}!",
    r"\frac{1}{" * 40 + "2" + "}" * 40,
    "(" * 200 + "1" + ")" * 200,
    "+".join("xyz" * 80),
    r"\sqrt" * 80 + "{72}",
    "\ud800",
    "72\n[]\n",
    '72", "72", 9]\n["72',
]


def test_hostile_expressions_are_never_right_and_stay_within_limits(started, note_fault):
    before = time.perf_counter()
    verdicts = [compare(text, "73", 0.3) for text in HOSTILE]
    assert Verdict.EQUAL not in verdicts
    assert compare("146/2", "73", 5.0) is Verdict.EQUAL  # and question and reply still belong together
    assert time.perf_counter() - before < 12
    note_fault(
        "answer that math-verify cannot parse in time",
        provoked="towers of powers, deep fractions and roots, thousands of terms, half surrogate pairs",
        outcome="counts as wrong after a time limit; the next answer gets a new process",
        tries=8,
    )


def test_a_script_without_main_guard_leaves_no_process(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import torch
        torch.set_num_threads(2)
        (torch.randn(300, 300) @ torch.randn(300, 300)).sum()
        print("script runs")
        from sft_lightning.grading import math_processes
        print(math_processes.compare("1/2", "0.5", 5.0).value)
        print(math_processes._idle_workers[0]._process.pid)
        """)
    )
    # Modules of these names in the user's own folder must not reach the grading process.
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    first, second, pid = done.stdout.splitlines()
    assert (first, second) == ("script runs", "equal")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
