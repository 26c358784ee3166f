"""Run soak.py with twelve kills in `make test-all` and 300 in `make soak`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "soak.py"


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_result(note_fault):
    numbers = os.environ.get("SFT_SOAK", "10 2 0").split()
    program = [sys.executable, str(PROGRAM), *numbers]
    lines = []
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    counts = json.loads(lines[-1])
    assert process.returncode == 0, "".join(lines)
    assert counts["tries"] == sum(map(int, numbers))
    assert counts["killed_while_writing"] * 2 >= counts["tries"] - 2
    assert counts["survivors"] >= 2
    assert counts["losses"] == 0
    outcome = "`--ckpt_path auto` resumes to the weights, optimizer state, metrics and answers of a run never killed"
    for fault, tries in (
        ("SIGKILL while a checkpoint is written", counts["killed_while_writing"]),
        ("SIGKILL at any other moment", counts["tries"] - counts["killed_while_writing"]),
    ):
        provoked = "at random, in children and in whole processes"
        note_fault(fault, provoked=provoked, outcome=outcome, lost="nothing but time", tries=tries)
