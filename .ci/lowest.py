"""Prints the lowest versions that pyproject.toml allows, as constraints for pip. `make test-oldest` installs these."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)")


def lowest(pyproject: str) -> list[str]:
    """Returns a line for each package that the text of a pyproject.toml names with a lower bound, sorted."""
    project = tomllib.loads(pyproject)["project"]
    extras = project.get("optional-dependencies", {}).values()
    found = (REQUIREMENT.match(line) for lines in (project["dependencies"], *extras) for line in lines)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match})


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"))))
