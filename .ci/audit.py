"""Looks up known vulnerabilities of the versions in constraints.txt. Run by `make audit`, where pip-audit is installed.

pip-audit ends with 0, and says that nothing is known, where the service does not know a single one of the packages, as
an index behind a proxy may do. So its report is read here instead. Exit code: 0 all were looked up and none is known
to be vulnerable, 1 one is, 3 some or all could not be looked up.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def verdict(report: dict | None, num_expected: int) -> tuple[int, list[str]]:
    """Returns the exit code and what to say.

    Args:
        report: pip-audit's, None where it wrote none.
        num_expected: Packages that were to be looked up.
    """
    if report is None:
        return 3, ["the service is not reachable: nothing was looked up"]
    packages = report["dependencies"]
    lines = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        + (f", fixed in {', '.join(fixes)}" if (fixes := vulnerability["fix_versions"]) else ", not fixed yet")
        for package in packages
        for vulnerability in package.get("vulns", ())
    ]
    missing = [package["name"] for package in packages if "skip_reason" in package]
    num_looked_up = len(packages) - len(missing)
    if num_looked_up < num_expected:
        named = f": {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}" if missing else ""
        lines.append(f"{num_expected - num_looked_up} of {num_expected} packages were not looked up{named}")
    if any(package.get("vulns") for package in packages):
        return 1, lines
    if num_looked_up < num_expected:
        if not num_looked_up:
            lines.append("the service knows none of them, or is not reachable")
        return 3, lines
    return 0, [f"{num_expected} packages, no known vulnerability"]


def num_pinned(constraints: str) -> int:
    """Returns how many packages a constraints file pins."""
    return sum("==" in line for line in constraints.splitlines())


def main() -> int:
    """Runs pip-audit on the pinned versions; prints what it found."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps", "--progress-spinner", "off"]
    command += ["--requirement", str(CONSTRAINTS), "--format", "json", *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = None
        print("\n".join(done.stderr.splitlines()[-3:]), file=sys.stderr)
    exit_code, lines = verdict(report, num_pinned(CONSTRAINTS.read_text(encoding="utf-8")))
    for line in lines:
        print(f"audit: {line}", file=sys.stdout if exit_code == 0 else sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
