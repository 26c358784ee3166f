import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_lightning.grading import math_worker
from sft_lightning.grading.math_worker import are_equal

TOWER = "9^{9^{9^{9}}}"  # its digits would fill the universe

# answer, ground truth, whether they are equal, all as math_equality.structures returns them
PAIRS = [
    ("B", "C", False),
    ("(B)", "B", True),
    ("1e3", "1000", False),
    ("1/2", "0.5", True),
    ("0.5", "1/2", True),
    ("-1/2", "-0.5", True),
    ("--72", "72", True),
    ("2/4", "1/2", True),
    ("1/3", "0.5", False),
    ("0.33", "1/3", False),
    ("0.333333", "1/3", True),  # to six places
    ("144/2", "72", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac12", r"\frac{1}{2}", True),
    (r"\frac{3}{4}", "0.75", True),
    (r"72\frac{1}{2}", "72.5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("sqrt(12)", r"2\sqrt{3}", True),
    (r"2\sqrt{3}", r"\sqrt{13}", False),
    (r"\sqrt[3]{8}", "2", True),
    ("2^{10}", "1024", True),
    (r"6 \times 12", "72", True),
    (r"\pi", r"\pi", True),
    (r"2\pi", "6.28", False),
    (r"\sin(\frac{\pi}{2})", "1", True),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("x^2 + 2x", "(x+1)^2", False),
    ("2xy", "2yx", True),
    ("5", "x=5", True),
    ("4", "x=5", False),
    ("2, 1", "1,2", True),
    ("2, 2", "1,2", False),
    ("(2, 1)", "(1,2)", False),
    (r"(3, \frac{\pi}{2})", r"(3,\pi/2)", True),
    ("[1, 2)", "[1,2)", True),
    ("[1, 2]", "[1,2)", False),
    (r"\{1, 2\}", r"\{2, 1\}", True),
    (r"x \leq 5", "x <= 5", True),
    (r"x \geq 5", "x <= 5", False),
    ("i^2", "-1", True),
    # small numbers are not 0, and not each other
    (r"\frac{1}{3^{40}}", r"\frac{1}{3^{41}}", False),
    (r"\frac{1}{3^{40}}", "3^{-40}", True),
    (r"\frac{\sqrt{2}}{3^{40}}", r"\frac{\sqrt{3}}{3^{40}}", False),
    (r"\frac{\sqrt{8}}{3^{40}}", r"\frac{2\sqrt{2}}{3^{40}}", True),
    (r"\frac{x}{3^{40}}", r"\frac{x}{3^{41}}", False),
    ("x+y=3^{-40}", "x+y=3^{-41}", False),
    ("0.00000011", "10^{-7}", False),
    ("0.0000001", "10^{-7}", True),
    ("2^{100}+1", "2^{100}", False),
    (r"\infty^2", r"2\pi", False),
    (r"2 \cdot \infty", r"\infty", True),
    # structures
    (["()", "0.5", "2"], ["()", "1/2", "2"], True),
    (["()", "2", "1"], ["()", "3", "1"], False),
    (["()", "1", "2"], ["[]", "1", "2"], False),
    (["()", "1", "2"], ["list", "1", "2"], False),
    (["()", r"3^{-40}", "2"], ["()", "3^{-41}", "2"], False),
    (["list", "2", "1/2"], ["list", "0.5", "2"], True),
    (["list", "1", "1", "3"], ["list", "1", "2", "3"], False),
    (["list", "1", "2", "2"], ["list", "1", "1", "2"], False),
    (["list", "0.5", "1", "1/2"], ["set", "1", "1/2"], True),
    (["list", "1", "3"], ["set", "1", "2"], False),
    (["set", "1"], ["set", "1", "2"], False),
    (["union", ["()", "1", "2"], ["[)", "3", "4"]], ["union", ["[)", "3", "4"], ["()", "1", "2"]], True),
    (["union", ["()", "1", "2"], ["()", "3", "4"]], ["union", ["()", "1", "4"], ["()", "3", "2"]], False),
    (["matrix", ["row", "0.5"], ["row", "x"]], ["matrix", ["row", "1/2"], ["row", "x"]], True),
    ("1", ["list", "1"], False),
]


@pytest.mark.parametrize(("answer", "truth", "is_equal"), PAIRS)
def test_are_equal(answer, truth, is_equal):
    assert are_equal(answer, truth) is is_equal


@pytest.mark.parametrize("answer", ["", "1/0", "0/0", r"\infty - \infty", r"\frac{72}", "72^", "^72", r"\sqrt{}"])
def test_meaningless_answers_are_wrong(answer):
    assert are_equal(answer, "72") is False


@contextmanager
def running_worker(**options):
    process = subprocess.Popen(
        [sys.executable, "-P", math_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="ascii",
        start_new_session=True,
        **options,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def give(process, answer, truth="72", seconds=10.0):
    process.stdin.write(json.dumps([answer, truth, seconds]) + "\n")
    process.stdin.flush()


def status_of(process, field):
    lines = Path(f"/proc/{process.pid}/{field}").read_text().splitlines()
    return {line[:26].split(":")[0].strip(): line[26:].split() for line in lines}


def test_each_line_gets_one_reply_and_nothing_else_is_printed():
    with running_worker() as process:
        for answer in ("144/2", "1/2", "72^", "1/0", r"\frac{144}{2}", "\ud800", "\x00", "\n"):
            give(process, answer)
        replies, errors = process.communicate(timeout=30)
    assert replies.splitlines() == ["true", "false", "false", "false", "true", "false", "false", "false"]
    assert errors == ""
    assert process.returncode == 0  # at the end of its input


def test_the_worker_dies_at_its_time_limit():
    with running_worker() as process:
        give(process, "144/2", seconds=5.0)
        assert process.stdout.readline() == "true\n"  # and the five seconds count no longer
        give(process, TOWER, seconds=0.3)
        assert process.stdout.readline() == ""
        assert process.wait(10) == -signal.SIGALRM


@pytest.mark.parametrize("inherited", ["blocked", "ignored"])
def test_the_time_limit_survives_inherited_signal_settings(inherited):
    def in_child():
        if inherited == "blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        else:
            signal.signal(signal.SIGALRM, signal.SIG_IGN)

    with running_worker(preexec_fn=in_child) as process:
        give(process, TOWER, seconds=0.3)
        assert process.wait(10) == -signal.SIGALRM


def test_a_worker_whose_program_died_ends_by_itself():
    with running_worker() as idle, running_worker() as busy:
        give(busy, TOWER, seconds=0.5)
        for process in (idle, busy):
            process.stdin.close()
        assert idle.wait(10) == 0
        assert busy.wait(10) == -signal.SIGALRM
        for process in (idle, busy):
            process.stdin = None  # closed: communicate() must not flush it


@pytest.mark.skipif(not Path("/proc/self/limits").is_file(), reason="reads Linux's /proc")
def test_memory_and_core_dumps_are_limited():
    with running_worker() as process:
        limits = status_of(process, "limits")
    assert limits["Max address space"][0] == "2147483648"
    assert limits["Max core file size"][0] == "0"


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="reads Linux's /proc")
def test_the_worker_does_not_load_the_package():
    with running_worker() as process:
        give(process, "144/2")
        assert process.stdout.readline() == "true\n"
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libpython" in loaded or "python" in loaded
    assert "libtorch" not in loaded


def test_running_out_of_memory_ends_only_the_worker(tmp_path):
    """The worker never exceeds its address space of 2 GiB, however it handles a MemoryError."""
    greedy = tmp_path / "greedy.py"
    folder = Path(math_worker.__file__).parent
    greedy.write_text(
        f"import sys\nsys.path.append({str(folder)!r})\nimport math_worker\n"
        "math_worker.are_equal = lambda answer, truth: len(bytearray(3 * 1024**3)) > 0\n"
        "math_worker.main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(greedy)],
        input='["1", "1", 9]\n',
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "ready\n"
    assert done.returncode == 1


def test_signals_of_schedulers_do_not_end_the_worker():
    with running_worker() as process:
        give(process, "144/2")
        assert process.stdout.readline() == "true\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        give(process, "144/2")
        assert process.stdout.readline() == "true\n"
