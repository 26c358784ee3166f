import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sft_lightning.grading import worker_process
from sft_lightning.grading.worker_process import NoReplyError, WorkerProcess

# Greets with its process id, doubles each line, and does what some lines say.
PROGRAM = f"""
import os, runpy, subprocess, sys, time
worker = runpy.run_path({worker_process.__file__!r})
tasks, reply = worker["open_streams"]()
reply(str(os.getpid()))
for line in tasks:
    match line.decode().strip():
        case "exit": sys.exit(3)
        case "sleep": time.sleep(60)
        case "sleep with an alarm":
            with worker["time_limit"](0.3):
                time.sleep(60)
        case "child": reply(str(subprocess.Popen(["sleep", "60"]).pid)); continue
        case "print": print("printed", flush=True)
        case "read": assert sys.stdin.read() == ""
        case "terminate": os.kill(os.getpid(), 15); os.kill(os.getpid(), 10)
    reply(line.decode().strip() * 2)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


@pytest.fixture
def worker(program, started):
    worker = WorkerProcess(program)
    yield worker
    worker.close()


def failure_of(worker, task, time_limit_seconds):
    with pytest.raises(NoReplyError) as raised:
        worker.ask(task, time_limit_seconds)
    return str(raised.value)


def test_each_task_gets_one_reply(worker, started):
    assert [worker.ask(task, 10.0) for task in (b"a\n", b"b\n")] == [b"aa\n", b"bb\n"]
    assert worker.is_alive
    assert int(worker.greeting) == started[0].pid


def test_a_death_is_a_crash_at_once(worker):
    before = time.monotonic()
    assert failure_of(worker, b"exit\n", 30.0) == "crashed"
    assert failure_of(worker, b"a\n", 30.0) == "crashed"
    assert time.monotonic() - before < 15
    worker.close()
    assert not worker.is_alive


def test_a_process_without_an_alarm_times_out_after_the_grace(worker):
    before = time.monotonic()
    assert failure_of(worker, b"sleep\n", 0.2) == "timed_out"
    assert 1.2 <= time.monotonic() - before < 10


def test_the_alarm_of_the_program_comes_before_the_grace(worker, started):
    assert failure_of(worker, b"sleep with an alarm\n", 0.3) == "timed_out"
    worker.close()
    assert started[0].returncode == -signal.SIGALRM


def test_closing_ends_child_processes_of_the_program(worker):
    child = int(worker.ask(b"child\n", 10.0))
    worker.close()
    worker.close()  # no harm
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail("the child lives")


def test_another_thread_may_kill_a_process_that_is_asked(worker):
    with ThreadPoolExecutor(1) as threads:
        failure = threads.submit(failure_of, worker, b"sleep\n", 30.0)
        time.sleep(0.2)
        worker.kill()
        assert failure.result(timeout=15) == "crashed"


def test_prints_go_to_stderr_and_the_program_reads_nothing(capfd, started, program):
    worker = WorkerProcess(program)
    assert worker.ask(b"print\n", 10.0) == b"printprint\n"
    assert worker.ask(b"read\n", 10.0) == b"readread\n"
    worker.close()
    assert capfd.readouterr() == ("", "printed\n")


def test_signals_of_schedulers_are_ignored(worker):
    assert worker.ask(b"terminate\n", 10.0) == b"terminateterminate\n"


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "import os; os.write(1, b'half a line')", ""])
def test_a_program_without_a_greeting_does_not_start(tmp_path, started, text):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(NoReplyError, match=r"^crashed$"):
        WorkerProcess(tmp_path / "broken.py")
    assert started[0].returncode is not None


def test_a_program_does_not_import_from_its_folder(program):
    """So that files of any name beside a program are harmless, and the program may not need the package."""
    (program.parent / "json.py").write_text("raise SystemExit('the wrong json')")
    script = f"{PROGRAM}\nimport json\nassert not any(name.startswith('sft_lightning') for name in sys.modules)\n"
    program.write_text(script)
    done = subprocess.run(
        [sys.executable, "-P", program], input="", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert (done.returncode, done.stderr) == (0, "")
