"""Check that every row of docs/reliability.md belongs to a test that notes a fault, and the reverse."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "reliability.md"


def names_of_fault_tests():
    """Returns the names of all tests that take the fixture ``note_fault``."""
    functions = [
        node
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    return [one.name for one in functions if "note_fault" in {argument.arg for argument in one.args.args}]


def test_the_page_and_the_tests_name_each_other():
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    named = {row[-1] for row in rows if len(row) == 6} - {"test"}
    assert named == set(names_of_fault_tests())
