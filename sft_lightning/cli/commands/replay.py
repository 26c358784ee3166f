"""Run each row of a non-finite step through the model alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.data.batch import Example
    from sft_lightning.diagnostics.replay import ReplayedRow


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser(
        "replay", "Run each row of a NaN or infinite step through the model alone, to find its cause."
    )
    parser.add_argument("folder", help="RUN/nonfinite/step-<n>")
    parser.add_argument("--model", help="folder or hub name; default: the run's last checkpoint before the step")
    options = parser.parse_args(args)
    folder = Path(options.folder)

    from sft_lightning.diagnostics.replay import replay_rows, weights_not_finite
    from sft_lightning.models.precision import Precision
    from sft_lightning.training.nonfinite import read_about

    about = read_about(folder)
    step, loss, norm = (about[name] for name in ("step", "loss", "gradient_norm"))
    path = options.model or _model_of_run(folder, about)
    model, examples, padding = _load(folder, path, about)
    print(f"optimizer step {step}: loss {loss}, gradient norm {norm}")
    print(f"model: {path}")
    for name in weights_not_finite(model):
        print(f"weight {name} contains values that are not finite")
    rows = []
    precision = Precision.named(about["precision"])
    for row in replay_rows(model, examples, layout=about["layout"], precision=precision, pad_token_id=padding):
        rows.append(row)
        print(_describe(row), flush=True)
    for source in about["rows_not_found"]:
        print(f"{source}  was not saved: its file had changed")
    print(f"{sum(not row.is_finite for row in rows)} of {len(rows)} rows are not finite alone")
    return 0


def _describe(row: "ReplayedRow") -> str:
    first = f"  first not finite: {row.first_not_finite}" if row.first_not_finite else ""
    return f"{row.source}  loss {row.loss:.6g}  gradient norm {row.gradient_norm:.6g}{first}"


def _model_of_run(folder: Path, about: Mapping[str, Any]) -> str:
    """Returns the run's last checkpoint before the step, or the model it started from."""
    run, checkpoint = folder.resolve().parents[1], about.get("checkpoint")
    if not checkpoint:
        return about["model_path"]
    path = run / checkpoint
    if not path.is_dir():
        raise UserError(f"the run's last checkpoint before the step, '{path}', is missing: name another with --model")
    return str(path)


def _load(folder: Path, path: str, about: Mapping[str, Any]) -> tuple[Any, "list[Example]", int]:
    import torch

    from sft_lightning.data.tokenization import load_tokenizer, pad_token_id
    from sft_lightning.models.loading import hide_progress_bars, load_model
    from sft_lightning.models.precision import Precision
    from sft_lightning.training.nonfinite import read_examples

    hide_progress_bars()
    tokenizer = load_tokenizer(about["tokenizer_path"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(about["seed"])
    model = load_model(
        path,
        init="pretrained" if path != about["model_path"] else about["init"],
        attn_implementation=about["attn_implementation"],
        device_type=device.type,
        precision=Precision.named(about["precision"]),
    )
    model.to(device)  # type: ignore[arg-type]
    return model, read_examples(folder, tokenizer, about), pad_token_id(tokenizer)
