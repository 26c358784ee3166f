"""Test which log lines are shown."""

import subprocess
import sys


def test_noise_of_lightning_is_hidden_and_our_lines_are_shown():
    program = (
        "import logging, warnings; from sft_lightning.cli.console import set_up_logging; set_up_logging();"
        "logging.getLogger('lightning.pytorch').info('GPU available: no');"
        "logging.getLogger('sft_lightning').info('rows dropped: 3');"
        "warnings.warn('Total length of `list` across ranks is zero'); warnings.warn('something else')"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "GPU available" not in shown
    assert "rows dropped: 3" in shown
    assert "across ranks is zero" not in shown
    assert "something else" in shown
