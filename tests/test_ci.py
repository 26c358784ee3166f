"""Test the scripts in .ci: the verdicts of `make audit` on reports of pip-audit 2.10, and the lowest versions."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def audit():
    return script("audit")


SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
KNOWN = {"id": "PYSEC-2026-1", "fix_versions": ["3.1.7", "4.0"], "aliases": [], "description": "x"}
VULNERABLE = {"name": "jinja2", "version": "3.1.6", "vulns": [KNOWN, KNOWN | {"id": "GHSA-1", "fix_versions": []}]}
SKIPPED = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}


@pytest.mark.parametrize(
    ("packages", "exit_code", "lines"),
    [
        ([SOUND, SOUND], 0, ["2 packages, no known vulnerability"]),
        (
            [SOUND, VULNERABLE],
            1,
            ["jinja2 3.1.6: PYSEC-2026-1, fixed in 3.1.7, 4.0", "jinja2 3.1.6: GHSA-1, not fixed yet"],
        ),
        ([SOUND, SKIPPED], 3, ["1 of 2 packages were not looked up: torch"]),
        (
            [SKIPPED, SKIPPED],
            3,
            [
                "2 of 2 packages were not looked up: torch, torch",
                "the service knows none of them, or is not reachable",
            ],
        ),
        ([SOUND], 3, ["1 of 2 packages were not looked up"]),
    ],
)
def test_verdicts(audit, packages, exit_code, lines):
    assert audit.verdict({"dependencies": packages, "fixes": []}, 2) == (exit_code, lines)


def test_a_vulnerability_counts_despite_failed_lookups(audit):
    assert audit.verdict({"dependencies": [VULNERABLE, SKIPPED]}, 2)[0] == 1


def test_a_missing_report_is_a_failure(audit):
    assert audit.verdict(None, 2) == (3, ["the service is not reachable: nothing was looked up"])


def test_every_pinned_package_counts(audit):
    assert audit.num_pinned("# a comment\nnumpy==2.4.6\n\ntorch==2.13.0  # why\n") == 2
    assert audit.num_pinned((ROOT / "constraints.txt").read_text()) > 90


def test_ci_audits_in_a_separate_step():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "- run: make audit" in workflow
    assert "audit" not in (ROOT / ".ci" / "run").read_text()


def test_lowest_versions_are_the_bounds_of_all_requirements():
    text = """
[project]
dependencies = ["torch>=2.11", "lightning>=2.6,<2.7", "jsonargparse[signatures]>=4.41"]
[project.optional-dependencies]
dev = ["torch>=2.11", "mypy"]
"""
    lowest = script("lowest").lowest
    assert lowest(text) == ["jsonargparse==4.41", "lightning==2.6", "torch==2.11"]
    assert {"torch==2.11", "transformers==5.17", "lightning==2.6"} < set(lowest((ROOT / "pyproject.toml").read_text()))
