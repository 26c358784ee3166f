"""Write the report of a run: one self-contained page, and its figures as PNG files."""

import importlib.metadata
import json
import platform
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template

from sft_lightning.reporting.before_after import before_and_after
from sft_lightning.reporting.figures import figures
from sft_lightning.reporting.row_losses_section import row_losses_section
from sft_lightning.reporting.run_files import RunFiles, read_json, read_run
from sft_lightning.reporting.samples import samples_section
from sft_lightning.reporting.sections import (
    Contents,
    Section,
    config_section,
    evaluations_section,
    figures_section,
    result_section,
)
from sft_lightning.system.files import write_atomically

PAGE = "report/index.html"
ENVIRONMENT = "report/environment.json"

_PARTS = Path(__file__).with_name("assets")
_PACKAGES = ("sft-lightning", "torch", "lightning", "transformers")


# In the order of the page.
SECTIONS: tuple[Callable[[Contents], Section | None], ...] = (
    result_section,
    figures_section,
    evaluations_section,
    samples_section,
    row_losses_section,
    config_section,
)


def write_report(
    run: Path, *, files: RunFiles | None = None, state: str | None = None, with_plots: bool = True
) -> Path:
    """Writes ``report/index.html`` and the plots of a run from the files in its folder.

    Any of the files may be missing, as during training, after a crash, or in the folder of a plain evaluation.

    Args:
        run: Folder of the run.
        files: Its content, if it has been read.
        state: State of the run; None reads it from the folder.
        with_plots: Whether the figures are also written as PNG files, which takes one or two seconds.

    Returns:
        The page.

    Raises:
        UserError: If the folder has nothing to report.
    """
    files = files or read_run(run)
    contents = Contents(files, before_and_after(files), figures(files), _environment(run))
    page = run / PAGE
    with write_atomically(page) as file:
        file.write(_page(contents, state or _state(files)))
    if with_plots:
        from sft_lightning.reporting.plots import write_plot

        for figure in contents.figures:
            write_plot(figure, page.with_name(f"{figure.name}.png"))
    return page


def describe_environment(device: str) -> dict[str, str]:
    """Returns versions and the device of a run, and no name of a machine or a user."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"Python": platform.python_version(), **versions, "device": device}


def record_environment(run: Path, device: str) -> None:
    """Writes ``report/environment.json``, for reports that are written on another machine."""
    with write_atomically(run / ENVIRONMENT) as file:
        file.write(json.dumps(describe_environment(device), indent=2) + "\n")


def _environment(run: Path) -> dict[str, str]:
    recorded = read_json(run / ENVIRONMENT)
    if recorded:
        return {str(name): str(text) for name, text in recorded.items()}
    return describe_environment("not recorded; the versions are those that this page was written with")


def _state(files: RunFiles) -> str:
    if files.last_step is None:
        return "an evaluation"
    is_final = files.final_step is not None and files.final_step >= files.last_step
    return "finished" if is_final else "not finished"


def _page(contents: Contents, state: str) -> str:
    sections = [section for make in SECTIONS if (section := make(contents)) is not None]
    style, script = (_PARTS.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "samples.js"))
    return Template(_PARTS.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{contents.files.name}: report"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        header=_header(contents.files, state, sections),
        main="\n".join(_framed(section) for section in sections),
        footer=f"<p>Written by sft-lightning on {datetime.now(UTC):%Y-%m-%d at %H:%M} UTC.</p>",
    )


def _hash(text: str) -> str:
    """Returns the hash by which a content security policy allows an inline text."""
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _header(files: RunFiles, state: str, sections: list[Section]) -> str:
    facts = [f"<li>State <b>{escape(state)}</b></li>"]
    if files.last_step is not None:
        facts.append(f"<li>Optimizer step <b>{files.last_step:,}</b></li>")
    if files.best_step is not None:
        facts.append(f"<li>Best <b>step {files.best_step:,}</b></li>")
    if files.latest is not None:
        facts.append(f"<li>Evaluated prompts <b>{len({row['index'] for row in files.latest.samples}):,}</b></li>")
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.title)}</a></li>' for section in sections)
    return (
        f'<p class="kicker">Training report</p><h1>{escape(files.name)}</h1><ul class="facts">{"".join(facts)}</ul>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    )


def _framed(section: Section) -> str:
    return (
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
        f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>{section.html}</section>'
    )
