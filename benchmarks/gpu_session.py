"""Run one GPU session of at most five minutes: gpu-marked tests, exactness of kernels, speed, compilation, generation.

    python benchmarks/gpu_session.py --out results [--seconds 290] [--only PART ...] [--data DIR] [--tiny]

Each part runs in a separate process with a limit on its time, the most important first. What it has found is in
``results.json`` after every measurement, so that a part which is stopped keeps it; ``tables.txt`` is the same for
reading, ``profiles.txt`` has the operators and kernels of a step, ``log.txt`` the parts' own output. Nothing is
downloaded, and nothing but torch, transformers and lightning is needed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
# Seconds at most, in order of importance. Parts that end early leave their time to the last one.
PARTS = {"tests": 60, "kernels": 30, "speed": 110, "compile": 70, "generation": 30}
_MIN_SECONDS_OF_A_PART = 15


def main() -> None:
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
    from gpu.session import add_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=290.0, help="limit on the whole session")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    args = parser.parse_args()
    if args.part:
        run_part(args)
    else:
        run_parts(args)


def run_parts(args: argparse.Namespace) -> None:
    """Runs each part in a separate process and collects the results."""
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work = args.work or Path(tempfile.mkdtemp(prefix="gpu-session-"))
    report: dict[str, Any] = {"tiny": args.tiny, "ended": {}, "seconds": {}}
    for name in args.only or PARTS:
        left = args.seconds - (time.monotonic() - begun)
        if left < _MIN_SECONDS_OF_A_PART:
            report["ended"][name] = "not started: no time left"
            continue
        started = time.monotonic()
        report["ended"][name] = _run_process(name, args, min(PARTS[name], left))
        report["seconds"][name] = round(time.monotonic() - started, 1)
        print(f"{name}: {report['ended'][name]}, {report['seconds'][name]} s", flush=True)
        path = args.work / f"{name}.json"
        report[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "tables.txt").write_text(tables(report), encoding="utf-8")
        for file in ("profiles.txt", "log.txt"):
            if (args.work / file).is_file():
                (args.out / file).write_bytes((args.work / file).read_bytes())
    print(tables(report))


def _run_process(name: str, args: argparse.Namespace, seconds: float) -> str:
    """Returns how the part has ended."""
    # A part stops measuring by itself before it is stopped. A tiny one on a slow CPU may take its time.
    options = ["--out", args.out, "--work", args.work, "--data", args.data, "--seconds", seconds - 3]
    command = [sys.executable, __file__, "--part", name, *map(str, options), *(["--tiny"] if args.tiny else [])]
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"SFT_CACHE_DIR": str(args.work / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    with (args.work / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n===== {name}\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY, start_new_session=True
        )
        try:
            code = process.wait(600 if args.tiny else seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # pytest and its children, too
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"exit code {code}"


def run_part(args: argparse.Namespace) -> None:
    from gpu.session import Session

    session = Session(args)
    if args.part == "tests":
        run_tests(session, args.seconds)
    elif args.part == "kernels":
        from gpu import kernels

        kernels.run(session)
    elif args.part == "generation":
        from gpu import generation

        generation.run(session)
    else:
        from gpu import speed

        (speed.run if args.part == "speed" else speed.run_compiled)(session)


def run_tests(session: Any, seconds: float) -> None:
    """Runs the gpu-marked tests; a tiny session some that need no GPU."""
    marked = re.compile(r"^@pytest\.mark\.gpu$", re.MULTILINE)
    files = [str(path) for path in (REPOSITORY / "tests").rglob("test_*.py") if marked.search(path.read_text("utf-8"))]
    select = ["-m", "gpu"]
    if session.tiny:
        files, select = [str(REPOSITORY / "tests/models/attention/test_kernels.py")], ["-m", "not gpu"]
    report = session.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([*command, *select, *sorted(files)], cwd=REPOSITORY, timeout=None if session.tiny else seconds)
    if not report.is_file():
        session.put("report", "none: the tests were stopped")
        return
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "passed" if outcome is None else f"{outcome.tag}: {' '.join(outcome.get('message', '').split())[:300]}"
        session.put(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", text)


def tables(report: dict[str, Any]) -> str:
    """Returns the results one a line, those of training steps in columns."""
    lines = []
    for name in report["ended"]:
        lines.append(f"\n## {name}: {report['ended'][name]}, {report['seconds'].get(name, 0)} s")
        for title, value in report.get(name, {}).items():
            if isinstance(value, dict) and "ms_per_step" in value:
                text = (
                    f"{value['ms_per_step']:8.1f} ms/step {value['tokens_per_second']:8.0f} tokens/s "
                    f"MFU {value.get('mfu', 0):6.1%} peak {value.get('peak_gb', 0):5.1f} GB "
                    f"waits {value.get('waits')} kernels {value.get('kernels')} busy {value.get('gpu_busy_ms')} ms"
                )
            else:
                text = _short(value)
            lines.append(f"{title:50s} {text}")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{name}={_short(item)}" for name, item in value.items())
    return str(value)


if __name__ == "__main__":
    main()
