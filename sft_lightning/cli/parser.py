"""The parser of the commands that need no Trainer."""

import argparse
from typing import NoReturn

from sft_lightning.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"sft-lightning {command}", description=description)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
