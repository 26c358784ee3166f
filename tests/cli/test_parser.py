"""Test the parser of the commands without a Trainer."""

import pytest

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError


def test_a_mistake_is_one_line_without_the_usage():
    parser = CommandParser("count", "Counts.")
    parser.add_argument("--to", type=int)
    with pytest.raises(UserError, match=r"^argument --to: invalid int value: 'x'$"):
        parser.parse_args(["--to", "x"])


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        CommandParser("count", "Counts.").parse_args(["--help"])
    assert capsys.readouterr().out.startswith("usage: sft-lightning count [-h]\n\nCounts.\n")
