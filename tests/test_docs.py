"""Run every code block of README and docs, or parse it where a marker gives the reason it cannot run.

A block is a fenced one. Its language says what happens to it:

- ``bash``: each ``sft-lightning`` command runs in this process and must exit with 0;
- ``python``: runs; ``yaml``: is a config, which ``fit`` must accept; ``json``: is one JSON value a line;
- ``text``: is output or a drawing.

A block with ``title="NAME"`` is the content of a file of that name, which exists while the page's blocks run. The
blocks of a page run in order in one folder, which holds the repository's configs, GSM8K-like rows and a tiny model
under each hub name that pages use. ``<!-- parse only: REASON -->`` or ``<!-- slow: REASON -->`` goes in front of a
block.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import sft_lightning
from sft_lightning.cli.main import HELP, main
from sft_lightning.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(
    r"^(?:<!-- (?P<marker>parse only|slow): (?P<reason>[^\n]+) -->\n)?```(?P<info>[^\n]*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
TAKE_OPTIONS_OF_FIT = ("check", "selftest", "sweep")
HUB_NAMES = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Math-1.5B")
TRAINED = "checkpoints/quickstart"  # what blocks after `make quickstart` read


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    marker: str | None
    language: str
    title: str | None
    text: str

    @property
    def runs(self):
        return self.marker != "parse only" and self.title is None and self.language in ("bash", "python")


def blocks_of(page):
    text = page.read_text("utf-8")
    found = []
    for fence in FENCE.finditer(text):
        language, _, attributes = fence["info"].partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', attributes)
        line = text.count("\n", 0, fence.start("text"))
        found.append(Block(page, line, fence["marker"], language, title and title[1], fence["text"]))
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def name_of(page):
    return str(page.relative_to(ROOT))


def is_slow(page):
    """Returns whether running a page needs a trained quickstart or is marked slow."""
    return any(block.marker == "slow" or (block.runs and TRAINED in block.text) for block in BLOCKS[page])


def commands_of(text):
    """Yields the words of each command of a bash block, with variables before and redirections behind it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def own_command(words):
    """Returns the options after sft-lightning or -m sft_lightning, or None for a command of another program."""
    for start in ("sft-lightning", "sft_lightning"):
        if start in words and not (start == "sft_lightning" and words[words.index(start) - 1] != "-m"):
            options = words[words.index(start) + 1 :]
            ends = [options.index(end) for end in (">", "&&", "|", ";") if end in options]
            return options[: min(ends, default=len(options))]
    return None


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with the quickstart's data and model, before training."""
    folder = tmp_path_factory.mktemp("quickstart-data")
    assert main(["prepare", "quickstart", "--output", str(folder / "data/quickstart")]) == 0
    return folder


def fill_workspace(folder, page, quickstart):
    """Puts the files that the blocks of a page need into a folder."""
    shutil.copytree(quickstart, folder, dirs_exist_ok=True, symlinks=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in HUB_NAMES:  # found before the hub is asked
        shutil.copytree(folder / "data/quickstart/model", folder / name)
    rows = [
        {"question": f"Ann has {a} pens and buys {b}. How many?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(2, 18)
        for b in range(2, 18)
    ]
    for name, part in (("train.jsonl", rows[:240]), ("test.jsonl", rows[240:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    for block in BLOCKS[page]:
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")


@pytest.fixture
def enter(tmp_path, monkeypatch):
    """Changes into a folder with the files that a page's blocks need."""

    def entered(page, quickstart):
        fill_workspace(tmp_path, page, quickstart)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    return entered


def exit_code(options):
    try:
        return main(options)
    except SystemExit as end:  # --print_config, --help
        return end.code


def run_bash(text, monkeypatch):
    for words in commands_of(text):
        with monkeypatch.context() as environment:
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):
                environment.setenv(*words.pop(0).split("=", 1))
            assert words[0] == "sft-lightning", f"'{shlex.join(words)}' does not run here: mark the block as parse only"
            assert exit_code(own_command(words)) == 0, shlex.join(words)


def check_options(options):
    """Raises where a command of ours has an option or a value that it does not know."""
    command, *rest = options
    if command in TRAINER_COMMANDS:
        assert exit_code([*options, "--print_config"]) == 0
    elif command in TAKE_OPTIONS_OF_FIT:
        _, of_fit = HOOKS.parser_of(command).parse_known_args(rest)
        check_options(["fit", *of_fit])
    elif not {"--help", "--version"} & set(options):
        words = options[:2] if command == "prepare" else options[:1]
        HOOKS.parser_of(*words).parse_args(options[len(words) :])


def check_make(targets):
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert set(targets) <= set(known)


def check_block(block):
    match block.language:
        case "bash":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for words in commands_of(block.text):
                if words[0] == "make":
                    check_make(words[1:])
                elif (options := own_command(words)) is not None:
                    check_options(options)
        case "python":
            compile(block.text, name_of(block.page), "exec")
        case "json":
            for line in block.text.splitlines():
                json.loads(line)
        case "yaml":
            assert yaml.safe_load(block.text)
            if block.marker != "parse only":
                Path("block.yaml").write_text(block.text, "utf-8")
                check_options(["fit", "--config", "block.yaml"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_language(page):
    assert page.read_text("utf-8").count("\n```") == 2 * len(BLOCKS[page])
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, f"line {block.line}"
        assert block.marker is None or block.language not in ("text", "json"), f"line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_parse(page, enter, tiny_folder):
    enter(page, tiny_folder)
    Path(TRAINED).mkdir(parents=True)
    shutil.copy(ROOT / "configs/quickstart.yaml", f"{TRAINED}/config.yaml")
    for block in BLOCKS[page]:
        try:
            check_block(block)
        except BaseException as error:
            raise AssertionError(f"{name_of(page)}, line {block.line}: {error}") from error


RUNNING = [
    pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if is_slow(page) else [])
    for page in PAGES
    if any(block.runs for block in BLOCKS[page])
]


@pytest.mark.parametrize("page", RUNNING)
def test_blocks_run(page, enter, tiny_folder, request, monkeypatch):
    enter(page, request.getfixturevalue("quickstart_run") if is_slow(page) else tiny_folder)
    for block in BLOCKS[page]:
        if block.runs:
            print(f"{name_of(page)}, line {block.line}")
            if block.language == "bash":
                run_bash(block.text, monkeypatch)
            else:
                exec(compile(block.text, f"{name_of(page)}, line {block.line}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "command", ["fit --data.batchsize 3", "evaluate --modle x", "check --data.batchsize 3", "prepare gsm8k --in x"]
)
def test_unknown_options_on_a_page_fail(command, enter, tiny_folder):
    enter(ROOT / "README.md", tiny_folder)
    with pytest.raises((UserError, AssertionError)):
        check_block(Block(ROOT / "README.md", 1, "parse only", "bash", None, f"sft-lightning {command}\n"))


def test_the_reference_names_every_command():
    page = (ROOT / "docs/reference/cli.md").read_text("utf-8")
    commands = re.findall(r"^  ([a-z]+(?: gsm8k| quickstart)?)  ", HELP, re.M)
    assert len(commands) > 10
    assert set(re.findall(r"^## `(.+)`$", page, re.M)) == set(commands)


def test_option_tables_hold_type_default_and_meaning():
    table = HOOKS.option_tables(HOOKS.parser_of("fit"))
    row = next(line for line in table.splitlines() if line.startswith("| `--data.max_length` |"))
    assert row.split(" | ")[1:3] == ["`int`", "`2048`"]
    assert "ENV" not in table


def test_the_python_reference_names_every_export():
    listed = re.findall(r"^::: sft_lightning\.(\w+)$", HOOKS.exports(), re.M)
    assert sorted(listed) == sorted(set(sft_lightning.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_of_the_repository(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and 404.html
    loads = re.compile(
        r"""<(?:script|img|iframe|link)\b(?![^>]*rel="canonical")[^>]*(?:src|href)=["']?(https?:)?//[^>]*>"""
    )
    styles = re.compile(r"(?:url\(|@import )[\"']?(?:https?:)?//")
    assert not [(page.name, tag[0]) for page in pages for tag in loads.finditer(page.read_text("utf-8"))]
    assert not [path.name for path in tmp_path.rglob("*.css") if styles.search(path.read_text("utf-8"))]


NAMED_PATH = re.compile(r"`((?:[a-z_]+/)+(?:[a-z_0-9-]+\.(?:py|ya?ml|json))?)`")
OF_THE_REPOSITORY = {path.name for path in [*ROOT.iterdir(), *(ROOT / "sft_lightning").iterdir()] if path.is_dir()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_source_paths_on_pages_exist(page):
    named = [path for path in NAMED_PATH.findall(page.read_text("utf-8")) if path.split("/")[0] in OF_THE_REPOSITORY]
    named = [path for path in named if not path.startswith(("checkpoints/", "data/quickstart", "data/gsm8k"))]
    missing = [path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "sft_lightning"))]
    assert not missing


NAMED_OPTION = re.compile(r"`(?:--)?((?:trainer|model|data|checkpoint|evaluation)\.[a-z_]+)(?![./(a-z_])[^`]*`")


def test_options_named_in_prose_exist():
    known = {name.removeprefix("--") for name in HOOKS.parser_of("fit")._option_string_actions}
    pages = [page for page in PAGES if "decisions" not in page.parts]  # which name attributes of models, too
    named = {(name_of(page), option) for page in pages for option in NAMED_OPTION.findall(page.read_text("utf-8"))}
    assert len(named) > 50
    assert not {(page, option) for page, option in named if option not in known}
