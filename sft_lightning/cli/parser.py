"""Parse the options of commands without a Trainer; report errors as one line."""

import argparse
from typing import NoReturn

from sft_lightning.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing the usage text."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"sft-lightning {command}", description=description)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
