"""Test the whole check on a clean set, and on copies with faults planted at known lines."""

import json
from dataclasses import replace

import pytest

from sft_lightning.data.batching.plan import StepShape
from sft_lightning.data.formats.r1_zero import R1_ZERO_PROMPT
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.diagnostics.check.check import CheckSettings, check
from sft_lightning.diagnostics.check.memory_estimate import Device
from sft_lightning.diagnostics.check.rows import CheckedSet
from sft_lightning.errors import UserError
from sft_lightning.grading.graders import R1ZeroGrader
from sft_lightning.models.precision import Precision
from sft_lightning.quickstart.arithmetic import write_arithmetic
from sft_lightning.quickstart.tiny_model import write_tiny_model

MAX_LENGTH = 256


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """The quickstart's folder with a sixteenth of its rows: 400 and 60."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_arithmetic(folder, num_train=400, num_heldout=60)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    before, after = R1_ZERO_PROMPT.split("{question}")
    write_tiny_model(folder / "model", texts, fixed_texts=(before.rstrip(" "), after))
    return folder


@pytest.fixture
def settings(quickstart, tmp_path):
    """The settings of a check of the quickstart's files, or of others."""

    def make(train=quickstart / "train.jsonl", val=quickstart / "heldout.jsonl", *, max_length=MAX_LENGTH, **options):
        tokenizer = load_tokenizer(str(quickstart / "model"))
        sets = tuple(
            CheckedSet(
                name,
                DataSettings(str(path), max_length=max_length, cache_dir=str(tmp_path / "cache")),
                tokenizer,
            )
            for name, path in (("train", train), ("val", val))
            if path is not None
        )
        defaults = CheckSettings(
            sets=sets,
            step_shape=StepShape(4, 8, 1),
            layout="auto",
            pad_to_multiple_of=None,
            seed=42,
            grader=R1ZeroGrader(),
            num_graded_answers=200,
            model_path=str(quickstart / "model"),
            precision=Precision.named("32-true"),
            gradient_checkpointing=False,
            with_entropy=True,
            device=Device("the test's", 8 * 2**30, is_cuda=False, is_known=True),
        )
        return replace(defaults, **options)

    return make


def changed(row, **fields):
    return json.dumps({**json.loads(row), **fields})


def plant(quickstart, folder):
    """Writes both sets with faults. Returns their paths."""
    train = (quickstart / "train.jsonl").read_text().splitlines()
    val = (quickstart / "heldout.jsonl").read_text().splitlines()
    train[49] = changed(train[49], response="  ")
    train[59] = changed(train[59], ground_truth=str(int(json.loads(train[59])["ground_truth"]) + 1))
    for line in (70, 71):
        train[line - 1] = changed(train[line - 1], prompt=f"{json.loads(train[line - 1])['prompt']} {'so ' * 300}")
    # 2% of 400, behind the others: lines 401 to 408 repeat 10, 20, ..., 80, but for those that are long or empty.
    train += [train[line - 1] for line in (10, 20, 30, 40, 51, 61, 72, 80)]
    train.append(val[6])  # line 409
    train.append(changed(val[7], response=" 1 </think> <answer> 0 </answer>", ground_truth="0"))  # line 410
    lines = [f"{line}\n".encode() for line in train]
    for line in range(100, 111):
        lines[line - 1] = lines[line - 1].replace(b"\n", b"\r\n")
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    (folder / "val.jsonl").write_bytes("".join(f"{line}\r\n" for line in val).encode())
    return folder / "train.jsonl", folder / "val.jsonl"


def test_nothing_is_found_in_the_clean_set(settings):
    report = check(settings())
    assert report.findings == []
    assert report.exit_code == 0
    train, val = report.sets
    assert (train.account.num_used, train.num_eos_supervised, train.num_graded) == (400, 400, 400)
    assert (val.account.num_used, val.num_eos_supervised, val.num_graded) == (60, 60, 60)
    assert [layout.layout for layout in report.layouts] == ["padded", "packed", "shared_prefix"]
    assert report.memory.num_parameters > 100_000


def test_exactly_the_planted_faults_are_found(settings, quickstart, tmp_path, lines_of):
    train, val = plant(quickstart, tmp_path)
    report = check(settings(train, val))
    found = [(finding.name, finding.severity, finding.message.partition(":")[0]) for finding in report.findings]
    assert sorted(found) == [
        ("bad_rows", "error", "train"),
        ("byte_order_mark", "info", "train"),
        ("crlf_line_ends", "info", "train"),
        ("crlf_line_ends", "info", "val"),
        ("duplicate_rows", "warning", "train"),
        ("overlength_rows", "info", "train"),
        ("validation_overlap", "error", "val"),
        ("wrong_answers", "warning", "train"),
    ]
    places = {(finding.name, finding.message.partition(":")[0]): lines_of(finding) for finding in report.findings}
    repeated = (10, 20, 30, 40, 51, 61, 72, 80)
    assert places["bad_rows", "train"] == [(50,)]
    assert places["byte_order_mark", "train"] == [(1,)]
    assert places["crlf_line_ends", "train"] == [(line,) for line in range(100, 111)]
    assert places["crlf_line_ends", "val"] == [(line,) for line in range(1, 61)]
    assert places["duplicate_rows", "train"] == list(zip(range(401, 409), repeated, strict=True))
    assert places["overlength_rows", "train"] == [(70,), (71,)]
    assert places["validation_overlap", "val"] == [(7, 409), (8, 410)]
    assert places["wrong_answers", "train"] == [(60,)]
    assert report.exit_code == 1
    assert [finding.severity for finding in report.findings][:2] == ["error", "error"]


def test_a_set_without_usable_rows_is_reported(settings, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("no json\n" * 3)
    with pytest.raises(UserError):
        # Without one readable row no template can be chosen by keys, which is where fit stops, too.
        check(settings(tmp_path / "none.jsonl"))
    report = check(settings(path))
    assert [finding.name for finding in report.findings] == ["bad_rows", "no_rows"]
    assert (report.exit_code, report.layouts, report.memory) == (1, [], None)


def test_a_model_config_without_weights_is_enough(settings, quickstart, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((quickstart / "model" / "config.json").read_bytes())
    assert check(settings(model_path=str(tmp_path / "model"), val=None)).memory is not None


def test_a_too_small_vocabulary_stops_the_check(settings, quickstart, tmp_path):
    config = json.loads((quickstart / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 7, "pad_token_id": None}))
    with pytest.raises(UserError, match=r"embedding of model\.model_path has 7 rows"):
        check(settings(model_path=str(tmp_path)))


def test_progress_names_each_stage(settings):
    told = []
    check(settings(), told.append)
    assert told[0] == "tokenizing train"
    assert told[-1] == "planning an epoch in each layout"


@pytest.mark.slow
def test_gsm8k_is_clean(settings, gsm8k):
    """Both files as they are published: no row twice, none in both, every solution right by its own number."""
    report = check(settings(gsm8k / "train.jsonl", gsm8k / "test.jsonl", max_length=2048))
    assert report.findings == []
    assert [each.account.num_used for each in report.sets] == [7473, 1319]
    assert [each.num_graded for each in report.sets] == [7473, 1319]
