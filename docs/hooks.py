"""Generate the command-line and Python reference from the parsers and the exports of the package."""

import argparse
import importlib
import inspect
import re
from collections import defaultdict
from typing import Any, NoReturn
from unittest.mock import patch

import sft_lightning
from sft_lightning.cli.main import main

COMMAND = re.compile(r"<!-- options of: (.+) -->")
EXPORTS = "<!-- exports -->"
# jsonargparse and argparse put type and default behind an option's help.
_TYPE_AND_DEFAULT = re.compile(
    r"\s*\((?:required, )?(?:type: (?P<type>.*?))?(?:, )?(?:default: (?P<default>.*))?\)$", re.S
)


class _ParserFoundError(Exception):
    pass


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of a page. Called by MkDocs for each page."""
    markdown = COMMAND.sub(lambda marker: option_tables(parser_of(*marker[1].split())), markdown)
    return markdown.replace(EXPORTS, exports()) if EXPORTS in markdown else markdown


def parser_of(*command: str) -> argparse.ArgumentParser:
    """Returns the parser behind ``sft-lightning COMMAND --help``."""

    def found(parser: argparse.ArgumentParser, file: Any = None) -> NoReturn:
        raise _ParserFoundError(parser)

    with patch.object(argparse.ArgumentParser, "print_help", found):
        try:
            main([*command, "--help"])
        except _ParserFoundError as parser:
            return parser.args[0]
    raise ValueError(f"'{' '.join(command)}' has no parser")


def option_tables(parser: argparse.ArgumentParser) -> str:
    """Returns a Markdown table of options for each group of a parser."""
    groups = [
        (group.title, [action for action in group._group_actions if _is_shown(action)])
        for group in parser._action_groups
    ]
    groups = [(title, actions) for title, actions in groups if actions]
    tables = []
    for title, actions in groups:
        rows = [_cells(parser, action) for action in actions]
        header = ["option", "type", "default", "meaning"]
        shown = [column for column in range(4) if any(row[column] for row in rows)]
        lines = [[header[column] for column in shown], ["---"] * len(shown), *([row[i] for i in shown] for row in rows)]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        tables.append(f"**{title}**\n\n{table}" if len(groups) > 1 else table)
    return "\n\n".join(tables)


def exports() -> str:
    """Returns mkdocstrings directives for every public name, under a heading for each room of the package."""
    rooms = defaultdict(list)
    for name in sft_lightning.__all__:
        if not name.startswith("_"):
            rooms[getattr(sft_lightning, name).__module__.split(".")[1]].append(name)
    lines = []
    for room, names in rooms.items():
        about = inspect.getdoc(importlib.import_module(f"sft_lightning.{room}")) or ""
        lines += [f"## {room}", "", about.split("\n\n")[0], ""]
        lines += [f"::: sft_lightning.{name}\n" for name in names]
    return "\n".join(lines)


def _is_shown(action: argparse.Action) -> bool:
    """Returns whether an option belongs into the reference; --help itself does not."""
    return action.help != argparse.SUPPRESS and not any(
        name.endswith(("--help", ".help")) for name in action.option_strings
    )


def _cells(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str, str, str]:
    """Returns an option's names, type, default and meaning."""
    text = " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""
    behind = _TYPE_AND_DEFAULT.search(text)
    kind, default = (behind["type"] or "", behind["default"] or "") if behind else ("", "")
    meaning = text[: behind.start()] if behind else text
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest.upper()}`"
    default = default.partition(", known subclasses")[0]
    return names, _code(kind), _code(default), _escaped(meaning)


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def _escaped(text: str) -> str:
    """Escapes text that would end a table's cell or begin a tag, except inside backticks."""
    parts = text.replace("``", "`").replace("|", r"\|").split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)
