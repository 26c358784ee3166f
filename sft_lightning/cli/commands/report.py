"""Write the report of a run or of one evaluation from the files in its folder."""

from pathlib import Path

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("report", "Write a page with the results of a run, from the files in its folder.")
    parser.add_argument("run", help="output_dir of fit, finished or not, or of evaluate")
    folder = Path(parser.parse_args(args).run).expanduser()
    from sft_lightning.evaluation.comparison import LABELS, comparison_table
    from sft_lightning.reporting.before_after import before_and_after, rates_of
    from sft_lightning.reporting.page import write_report
    from sft_lightning.reporting.row_losses import describe_row_losses, read_row_losses
    from sft_lightning.reporting.run_files import read_run

    files = read_run(folder)
    page = write_report(folder, files=files)
    changed = before_and_after(files)
    if changed.comparison is not None:
        print(comparison_table(changed.comparison))
    elif files.evaluations:
        for name, (rate, low, high) in rates_of(files.evaluations[-1]).items():
            print(f"{LABELS[name]:8} {rate:.3f} [{low:.3f} {high:.3f}]")
        print("[95% intervals]")
    if changed.note:
        print(changed.note)
    try:
        findings = read_row_losses(folder)
    except UserError as error:  # the rest of the report stands
        print(error)
    else:
        print("\n".join(describe_row_losses(findings) if findings else ()))
    print(f"report: {page}")
    return 0
