import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_lightning.data import token_store as cache
from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.filters import CorrectResponses
from sft_lightning.data.formats.base import Record
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import TokenStore, load_or_build_tokens
from sft_lightning.errors import UserError
from sft_lightning.system.files import file_digest

EOS = 0
VOCABULARY = {"</s>": EOS, "one": 1, "two": 2, "plus": 3, "is": 4, "three": 5}


def word_tokenizer(vocabulary=VOCABULARY):
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


TOKENIZER = word_tokenizer()
ROWS = [
    {"prompt": "one plus two", "response": "is three"},
    {"prompt": "two", "response": "two", "weight": 0.25},
    {"prompt": "one plus one plus one", "response": "three"},
]


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", ROWS)


def load(path, *, tokenizer=TOKENIZER, **options):
    defaults = {"max_length": 100, "cache_dir": Path(path).parent / "cache"}
    return load_or_build_tokens(DataSettings(path, **defaults | options), tokenizer)


def rows_of(store):
    """[(tokens, prompt tokens, source)] of a store whose rows are a prompt and its response."""
    rows = []
    for example in store:
        (sequence,) = example.sequences
        assert sequence.label_spans == ((len(sequence.prefix), len(sequence.tokens), 1.0),)
        rows.append((sequence.tokens.tolist(), len(sequence.prefix), example.source))
    return rows


def tokens_of(example):
    (sequence,) = example.sequences
    return sequence.tokens.tolist()


def stores_in(folder):
    return sorted(path.name for path in folder.iterdir())


def forbid_tokenizing(monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(cache, "tokenize_records", fail)


# What is in a store


def test_rows_lengths_and_weights(data):
    store = load(data)
    assert rows_of(store) == [
        ([1, 3, 2, 4, 5, EOS], 3, f"{data}:1"),
        ([2, 2, EOS], 1, f"{data}:2"),
        ([1, 3, 1, 3, 1, 5, EOS], 5, f"{data}:3"),
    ]
    assert store[0].sequences[0].tokens.dtype == np.int32
    assert store[-1].source == f"{data}:3"
    for array, values, dtype in (
        (store.total_lengths, [6, 3, 7], np.int64),
        (store.label_lengths, [3, 2, 2], np.int64),
        (store.weights, [1.0, 0.25, 1.0], np.float64),
    ):
        assert array.tolist() == values
        assert array.dtype == dtype


def test_an_index_outside_is_an_index_error(data):
    with pytest.raises(IndexError):
        load(data)[3]


def test_without_eos(data):
    assert tokens_of(load(data, append_eos=False)[1]) == [2, 2]


def test_the_first_rows_are_a_view(data):
    store = load(data)
    first = store.first(2)
    assert rows_of(first) == rows_of(store)[:2]
    assert first.total_lengths.tolist() == [6, 3]
    assert first.fingerprint == store.fingerprint
    assert len(store.first(99)) == 3
    with pytest.raises(UserError, match=r"data\.max_train_examples is 0"):
        store.first(0)


def test_the_first_rows_are_counted_after_filtering(data):
    assert [example.source for example in load(data, max_length=6).first(2)] == [f"{data}:1", f"{data}:2"]
    write_rows(data, [ROWS[2], ROWS[0], ROWS[1]])
    assert [example.source for example in load(data, max_length=6).first(2)] == [f"{data}:2", f"{data}:3"]


def test_a_pickled_store_is_small_and_opens_again(data):
    store = load(write_rows(data, ROWS * 1000)).first(2000)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    assert rows_of(pickle.loads(pickled)) == rows_of(store)


def test_more_rows_than_are_tokenized_at_once(data):
    store = load(write_rows(data, ROWS * 1000))
    assert len(store) == 3000
    assert rows_of(store)[2997:] == [
        ([1, 3, 2, 4, 5, EOS], 3, f"{data}:2998"),
        ([2, 2, EOS], 1, f"{data}:2999"),
        ([1, 3, 1, 3, 1, 5, EOS], 5, f"{data}:3000"),
    ]


def test_several_files_each_with_its_template_and_lines(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "b.jsonl", ROWS[:1])
    write_rows(folder / "a.jsonl", [{"question": "one", "answer": "two #### 3"}])
    store = load(folder)
    assert [example.source for example in store] == [f"{folder}/a.jsonl:1", f"{folder}/b.jsonl:1"]
    assert tokens_of(store[1]) == [1, 3, 2, 4, 5, EOS]
    assert [name.partition("/")[0] for name in store.fingerprint["template"].split(", ")] == [
        "sft_lightning.Plain",
        "sft_lightning.R1Zero",
    ]


# Rows of several sequences and label spans


def sequence(tokens, *label_spans):
    return TokenSequence(np.array(tokens, dtype=np.int32), tuple(LabelSpan(*span) for span in label_spans))


CONVERSATIONS = [
    Example((sequence([7, 8, 9, 1], (1, 2), (3, 4, 0.5)),), "data.jsonl:1"),
    # The second sequence begins with three tokens of the first, and the third continues the second.
    Example(
        (
            sequence([1, 2, 3, 4, 5], (3, 5)),
            sequence([1, 2, 3, 6, 7], (4, 5, 0.25)),
            sequence([1, 2, 3, 6, 7, 8], (1, 2), (3, 4, 0.0), (5, 6)),
        ),
        "data.jsonl:5",
    ),
    Example((sequence([5, 5], (1, 2)), sequence([6, 6], (1, 2))), "data.jsonl:6"),
]
CONVERSATION_WEIGHTS = [1.0, 0.5, 3.0]


def store_of(folder, examples, weights):
    rows = [
        (Record("prompt", "response", weight=weight, source=example.source), example)
        for example, weight in zip(examples, weights, strict=True)
    ]
    files = [Path(examples[0].source.rpartition(":")[0])]
    assert cache._write_rows(folder, iter(rows), files) == len(rows)
    cache._write_meta(folder, files, {}, LoadReport())
    return TokenStore(folder, files)


def content(examples):
    return [
        ([(tokens.tolist(), label_spans) for tokens, label_spans in example.sequences], example.source)
        for example in examples
    ]


def test_a_store_keeps_every_sequence_and_span_of_a_row(tmp_path):
    store = store_of(tmp_path, CONVERSATIONS, CONVERSATION_WEIGHTS)
    assert content(store) == content(CONVERSATIONS)
    assert content([store[-1]]) == content(CONVERSATIONS[-1:])
    assert {one.tokens.dtype for example in store for one in example.sequences} == {np.dtype(np.int32)}
    with pytest.raises(IndexError):
        store[3]


def test_lengths_and_weights_are_of_rows_over_all_their_sequences(tmp_path):
    store = store_of(tmp_path, CONVERSATIONS, CONVERSATION_WEIGHTS)
    for array, values, dtype in (
        (store.total_lengths, [4, 16, 4], np.int64),
        (store.input_lengths, [3, 13, 2], np.int64),
        (store.label_lengths, [2, 6, 2], np.int64),
        (store.weights, CONVERSATION_WEIGHTS, np.float64),
    ):
        assert array.tolist() == values
        assert array.dtype == dtype
    assert store.longest_sequence == 6


ONE_SEQUENCE_ROWS = [
    Example((TokenSequence(np.array([1, 2, 3, 4, 5, 6], np.int32), (LabelSpan(1, 2), LabelSpan(4, 6))),), "a.jsonl:1"),
    Example.from_prompt(np.array([7, 8, 9], np.int32), 2, "a.jsonl:2"),
]


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        (ONE_SEQUENCE_ROWS, [[([1, 2, 3, 4], 5)], [([7, 8], 2)]]),
        (CONVERSATIONS, [[(prefix.tolist(), n) for prefix, n in one.prefixes] for one in CONVERSATIONS]),
    ],
)
def test_prefixes_are_read_as_examples_have_them(tmp_path, examples, expected):
    store = store_of(tmp_path, examples, [1.0] * len(examples))
    read = [store.prefixes(index) for index in range(len(store))]
    assert [[(prefix.tolist(), num_inputs) for prefix, num_inputs in row] for row in read] == expected
    with pytest.raises(IndexError):
        store.prefixes(len(store))


def test_the_first_rows_have_all_their_sequences(tmp_path):
    store = store_of(tmp_path, CONVERSATIONS, CONVERSATION_WEIGHTS)
    for view in (store.first(2), pickle.loads(pickle.dumps(store.first(2)))):
        assert content(view) == content(CONVERSATIONS[:2])
        assert (view.total_lengths.tolist(), view.label_lengths.tolist()) == ([4, 16], [2, 6])
        assert (view.input_lengths.tolist(), view.weights.tolist()) == ([3, 13], [1.0, 0.5])
        with pytest.raises(IndexError):
            view[2]
    assert content(store.first(1)) == content(CONVERSATIONS[:1])


def test_tokens_that_a_sequence_repeats_are_stored_once(tmp_path):
    store_of(tmp_path, CONVERSATIONS, CONVERSATION_WEIGHTS)
    tokens = np.fromfile(tmp_path / "tokens.bin", dtype="<i4").tolist()
    assert tokens == [7, 8, 9, 1, 1, 2, 3, 4, 5, 6, 7, 8, 5, 5, 6, 6]
    # start, line, first span, row, weight, file, length, shared tokens, spans
    rows = np.fromfile(tmp_path / "rows.bin", dtype="<i8, <i8, <i8, <i8, <f8, <i4, <i4, <i4, <i4").tolist()
    assert rows == [
        (0, 1, 0, 0, 1.0, 0, 4, 0, 2),
        (4, 5, 2, 1, 0.5, 0, 5, 0, 1),
        (9, 5, 3, 1, 0.5, 0, 5, 3, 1),
        (11, 5, 4, 1, 0.5, 0, 6, 5, 3),
        (12, 6, 7, 2, 3.0, 0, 2, 0, 1),
        (14, 6, 8, 2, 3.0, 0, 2, 0, 1),
    ]
    spans = np.fromfile(tmp_path / "spans.bin", dtype="<i4, <i4, <f4").tolist()
    assert spans[:4] == [(1, 2, 1.0), (3, 4, 0.5), (3, 5, 1.0), (4, 5, 0.25)]


def test_prompt_and_response_take_68_bytes_beside_their_tokens(data):
    store = load(data)
    (folder,) = (data.parent / "cache").iterdir()
    assert sum((folder / name).stat().st_size for name in ("rows.bin", "spans.bin")) == 68 * len(store)
    assert (folder / "tokens.bin").stat().st_size == 4 * int(store.total_lengths.sum())


@given(st.data())
@settings(deadline=None)
def test_a_store_gives_back_any_conversations(conversations, labels_of, data):
    examples = data.draw(conversations)
    weights = [1 / 2**row for row in range(len(examples))]
    with TemporaryDirectory() as folder:
        store = store_of(Path(folder), examples, weights)
        num_rows = data.draw(st.integers(1, len(examples)))
        for view in (store, store.first(num_rows)):
            found = list(view)
            assert content(found) == content(examples[: len(view)])
            assert labels_of(found, view.weights.tolist()) == labels_of(examples[: len(view)], weights[: len(view)])
            assert view.label_lengths.tolist() == [example.num_labels for example in found]
            lengths = [[len(one.tokens) for one in example.sequences] for example in found]
            assert view.total_lengths.tolist() == [sum(each) for each in lengths]
            assert view.input_lengths.tolist() == [sum(each) - len(each) for each in lengths]


# Skipped rows


def test_skipped_rows_are_reported_now_and_at_every_hit(data, caplog):
    with data.open("a") as file:
        file.write("oops\n")
    report = {
        "rows": 2,
        "bad_rows": {"count": 1, "first": [(f"{data}:4", "not JSON: Expecting value (column 1)")]},
        "overlength_rows": {"count": 1, "first": [(f"{data}:3", "7 tokens")]},
        "truncated_prompts": 0,
        "ungraded_rows": {"count": 0, "first": []},
        "rejected_rows": {"count": 0, "first": []},
    }
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = load(data, max_length=6, max_bad_rows=1)
        assert store.report == report
        assert caplog.messages == [
            f"data path '{data}': bad rows skipped (1): {data}:4: not JSON: Expecting value (column 1). "
            f"rows over data.max_length dropped (1): {data}:3: 7 tokens"
        ]


def test_a_hit_forgives_no_more_bad_rows_than_a_build(data):
    with data.open("a") as file:
        file.write("oops\n")
    load(data, max_bad_rows=1)
    with pytest.raises(UserError, match=rf"too many bad rows \(1, data\.max_bad_rows is 0\): {data}:4: not JSON"):
        load(data)


def test_truncated_prompts(data):
    store = load(data, max_length=4, overlength="truncate_prompt")
    assert [tokens_of(example) for example in store] == [[2, 4, 5, EOS], [2, 2, EOS], [3, 1, 5, EOS]]
    assert store.report["truncated_prompts"] == 2


def test_overlength_as_an_error_leaves_no_store(data):
    with pytest.raises(UserError, match=rf"rows over data\.max_length 6 \(1\): {data}:3: 7 tokens"):
        load(data, max_length=6, overlength="error")
    assert stores_in(data.parent / "cache") == []


def test_a_set_without_usable_rows_is_an_error(data):
    with pytest.raises(UserError) as error:
        load(data, max_length=2)
    assert str(error.value) == (
        f"no row is left. rows over data.max_length dropped (3): {data}:1: 6 tokens; {data}:2: 3 tokens; "
        f"{data}:3: 7 tokens. Raise data.max_length (2)"
    )


# The row filter


class NoTwos:
    """Rejects responses that hold a two."""

    identity = "no twos"

    def __init__(self):
        self.judged = 0

    def faults(self, records):
        self.judged += len(records)
        return ["a two" if "two" in record.response else None for record in records]


FILTERED_ROWS = [
    {"prompt": "one", "response": "one", "ground_truth": "1"},
    {"prompt": "two", "response": "is two", "ground_truth": "2"},
    {"prompt": "one", "response": "three"},
    {"prompt": "one plus one plus one", "response": "three", "ground_truth": 3},
    {"prompt": "two", "response": "three", "ground_truth": ["3"]},
]


def test_filtered_rows_are_reported_now_and_at_every_hit(data, caplog):
    write_rows(data, FILTERED_ROWS)
    row_filter = NoTwos()
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            store = load(data, max_length=6, filter=row_filter)
        assert [example.source for example in store] == [f"{data}:1", f"{data}:5"]
        assert store.report == {
            "rows": 2,
            "bad_rows": {"count": 0, "first": []},
            "overlength_rows": {"count": 1, "first": [(f"{data}:4", "7 tokens")]},
            "truncated_prompts": 0,
            "ungraded_rows": {"count": 1, "first": [(f"{data}:3", "no ground_truth")]},
            "rejected_rows": {"count": 1, "first": [(f"{data}:2", "a two")]},
        }
        assert caplog.messages == [
            f"data path '{data}': data.filter_correct is on, 2 of 5 rows are kept. "
            f"rows over data.max_length dropped (1): {data}:4: 7 tokens. "
            f"rows whose response data.filter_correct does not accept dropped (1): {data}:2: a two. "
            f"rows that data.filter_correct cannot judge dropped (1): {data}:3: no ground_truth"
        ]
    assert row_filter.judged == 4, "a hit judges nothing again, and a row without ground truth is never judged"


def test_a_filter_that_rejects_nothing_reports_that(data, caplog):
    write_rows(data, FILTERED_ROWS[:1])
    with caplog.at_level(logging.INFO):
        load(data, filter=NoTwos())
    assert caplog.messages == [f"data path '{data}': data.filter_correct is on, 1 of 1 rows are kept"]


def test_stores_with_and_without_a_filter_are_separate(data):
    write_rows(data, FILTERED_ROWS)
    plain = load(data)
    (folder,) = (data.parent / "cache").iterdir()
    # The key without a word of filters: the format and the fingerprint.
    key = hashlib.sha256(json.dumps([2, plain.fingerprint], sort_keys=True).encode()).hexdigest()[:32]
    assert folder.name == key
    assert "filter" not in plain.fingerprint
    filtered = load(data, filter=NoTwos())
    assert filtered.fingerprint == {**plain.fingerprint, "filter": "no twos"}
    assert (len(plain), len(filtered)) == (5, 3)
    assert len(stores_in(data.parent / "cache")) == 2


def test_a_filter_that_rejects_every_row_is_an_error(data):
    write_rows(data, FILTERED_ROWS[1:3])
    with pytest.raises(UserError) as error:
        load(data, filter=NoTwos())
    assert str(error.value) == (
        f"no row is left. rows whose response data.filter_correct does not accept dropped (1): {data}:1: a two. "
        f"rows that data.filter_correct cannot judge dropped (1): {data}:2: no ground_truth. "
        "Look at these rows, name another data.grader, or set data.filter_correct: false"
    )
    assert stores_in(data.parent / "cache") == []


# Templates and graders of a user

TEMPLATE = """
from sft_lightning import Grade, Plain

class Own(Plain):
    def __init__(self, word="two"):
        self._word = word

    def render(self, row):
        return {{**super().render(row), "response": "{first} " + self._word}}

class Judge:
    def __init__(self, word="three"):
        self._word = word

    def grade(self, response, ground_truth):
        return Grade(True, response.startswith("{first}") and ground_truth != self._word)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Returns a new version of a user's module, whose template and grader begin with this word."""
    monkeypatch.syspath_prepend(tmp_path)

    def own(first):
        (tmp_path / "own_classes.py").write_text(TEMPLATE.format(first=first))
        sys.modules.pop("own_classes", None)
        importlib.invalidate_caches()
        return importlib.import_module("own_classes")

    yield own
    sys.modules.pop("own_classes", None)


def test_other_code_or_arguments_make_other_tokens(data, own, monkeypatch, note_fault):
    responses = []
    for first, *arguments in (["is"], ["is", "three"], ["plus"]):
        store = load(data, template=own(first).Own(*arguments))
        responses.append({tuple(tokens[prompt:]) for tokens, prompt, _ in rows_of(store)})
    assert responses == [{(4, 2, EOS)}, {(4, 5, EOS)}, {(3, 2, EOS)}]
    forbid_tokenizing(monkeypatch)
    assert {tuple(tokens[prompt:]) for tokens, prompt, _ in rows_of(load(data, template=own("is").Own()))} == responses[
        0
    ]
    note_fault(
        "other code or arguments behind the name of a user's template or grader",
        provoked="a template's render, a grader's grade and their private arguments are changed; the name stays",
        outcome="rows are tokenized and filtered anew; unchanged ones come from the cache",
        tries=4,
    )


def test_other_code_or_arguments_of_a_grader_filter_anew(data, own):
    write_rows(data, FILTERED_ROWS)
    kept = [
        [
            example.source.rpartition(":")[2]
            for example in load(data, filter=CorrectResponses(own(first).Judge(*arguments)))
        ]
        for first, *arguments in (["three"], ["three", 3], ["is"])
    ]
    assert kept == [["4", "5"], ["5"], ["2"]]


# The cache


def test_a_hit_tokenizes_nothing(data, monkeypatch):
    rows = rows_of(load(data))
    forbid_tokenizing(monkeypatch)
    assert rows_of(load(data)) == rows


def test_a_moved_file_is_a_hit_with_its_current_path(data, monkeypatch):
    load(data, max_length=6)
    moved = data.rename(data.with_name("moved.jsonl"))
    forbid_tokenizing(monkeypatch)
    store = load(moved, max_length=6)
    assert [example.source for example in store] == [f"{moved}:1", f"{moved}:2"]
    assert store.report["overlength_rows"]["first"] == [(f"{moved}:3", "7 tokens")]


def test_a_template_found_or_named_is_the_same(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl", [{"question": "one", "answer": "two #### 3"}])
    fingerprint = load(file).fingerprint
    forbid_tokenizing(monkeypatch)
    assert load(file, template=R1Zero()).fingerprint == fingerprint


def test_each_input_of_tokenization_is_part_of_the_key(data, tmp_path):
    first = load(data).fingerprint
    assert set(first) == {
        "data", "tokenizer", "template", "columns", "max_length", "overlength", "append_eos",
    }  # fmt: skip

    def changed(**options):
        fingerprint = load(data, **options).fingerprint
        return {name for name in fingerprint if fingerprint[name] != first[name]}

    assert changed() == set()
    assert changed(max_length=50) == {"max_length"}
    assert changed(overlength="truncate_prompt") == {"overlength"}
    assert changed(append_eos=False) == {"append_eos"}
    assert changed(columns={"prompt": "response", "response": "prompt"}) == {"columns"}
    assert changed(tokenizer=word_tokenizer(VOCABULARY | {"four": 6})) == {"tokenizer"}
    write_rows(data, ROWS[:2])
    assert changed() == {"data"}
    assert len(stores_in(tmp_path / "cache")) == 7


def test_changed_template_text_makes_a_new_store(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"question": "one", "answer": "two #### 3"}])
    own = tmp_path / "own.txt"
    own.write_text("plus {question}")
    assert load(file).fingerprint["template"] != load(file, template=R1Zero(str(own))).fingerprint["template"]
    assert tokens_of(load(file, template=R1Zero(str(own)))[0])[:2] == [3, 1]


@pytest.mark.parametrize("name", ["tokens.bin", "rows.bin", "spans.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_store_is_made_again(data, name, damage):
    rows = rows_of(load(data))
    (folder,) = (data.parent / "cache").iterdir()
    if damage == "gone":
        (folder / name).unlink()
    else:
        os.truncate(folder / name, (folder / name).stat().st_size - 1)
    assert rows_of(load(data)) == rows
    assert stores_in(data.parent / "cache") == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "rows.bin", "spans.bin", "tokens.bin"]


def test_a_store_of_another_format_is_made_again(data):
    rows = rows_of(load(data))
    (folder,) = (data.parent / "cache").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format"] == 2
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    assert rows_of(load(data)) == rows
    assert json.loads((folder / "meta.json").read_text()) == meta


def test_a_store_of_format_1_is_made_again(data):
    rows = rows_of(load(data))
    (folder,) = (data.parent / "cache").iterdir()
    # Format 1: no spans.bin, 36 bytes a row in rows.bin, and a meta.json that is true of both files.
    (folder / "spans.bin").unlink()
    (folder / "rows.bin").write_bytes(bytes(36 * len(rows)))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["format"], meta["sizes"]["spans.bin"], meta["digests"]["spans.bin"]
    meta["sizes"]["rows.bin"] = 36 * len(rows)
    meta["digests"]["rows.bin"] = file_digest(folder / "rows.bin")
    (folder / "meta.json").write_text(json.dumps(meta))
    assert rows_of(load(data)) == rows
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "rows.bin", "spans.bin", "tokens.bin"]


def test_a_build_that_dies_leaves_nothing_behind(data, monkeypatch):
    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write_meta", die)
    with pytest.raises(KeyboardInterrupt):
        load(data)
    assert stores_in(data.parent / "cache") == []


def test_data_that_changes_while_it_is_read_is_not_kept(data, monkeypatch):
    write_rows_of_store = cache._write_rows

    def write_and_change(*arguments):
        num_rows = write_rows_of_store(*arguments)
        write_rows(data, ROWS[:1])
        return num_rows

    monkeypatch.setattr(cache, "_write_rows", write_and_change)
    with pytest.raises(UserError, match="changed while it was read"):
        load(data)
    assert stores_in(data.parent / "cache") == []


def test_a_second_build_takes_the_store_of_the_first(data, monkeypatch):
    write_meta = cache._write_meta

    def let_another_be_first(*arguments):
        monkeypatch.setattr(cache, "_write_meta", write_meta)
        load(data)
        (folder,) = (path for path in (data.parent / "cache").iterdir() if not path.name.startswith("."))
        inodes.append((folder / "tokens.bin").stat().st_ino)
        write_meta(*arguments)

    inodes = []
    monkeypatch.setattr(cache, "_write_meta", let_another_be_first)
    assert len(load(data)) == 3
    (folder,) = (data.parent / "cache").iterdir()
    assert [(folder / "tokens.bin").stat().st_ino] == inodes


def load_when_all_are_ready(barrier, results, data):
    write_meta = cache._write_meta

    def meet_first(*arguments):
        barrier.wait(timeout=30)
        write_meta(*arguments)

    cache._write_meta = meet_first  # in this process only, which ends after it
    results.put(rows_of(load(data)))


def test_two_processes_that_race_end_with_one_store(data):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=load_when_all_are_ready, args=(barrier, results, data)) for _ in range(2)]
    for process in processes:
        process.start()
    rows = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert rows[0] == rows[1] == rows_of(load(data))
    assert len(stores_in(data.parent / "cache")) == 1


def test_where_the_cache_lies(data, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SFT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    load(data, cache_dir=None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(data, cache_dir=None)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "sft"))
    load(data, cache_dir=None)
    load(data, cache_dir="~/own")
    for folder in ("home/.cache/sft_lightning", "xdg/sft_lightning", "sft", "home/own"):
        assert len(stores_in(tmp_path / folder)) == 1


def test_a_cache_folder_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=rf"cannot write the token cache in data\.cache_dir '{tmp_path}/taken'"):
        load(data, cache_dir=tmp_path / "taken")


def test_opening_a_store_imports_neither_transformers_nor_pyarrow(data):
    store = load(data)
    pickled = data.with_name("store.pickle")
    pickled.write_bytes(pickle.dumps(store))
    code = (
        "import pickle, sys; store = pickle.load(open(sys.argv[1], 'rb')); assert len(store) == 3;"
        "assert not {'transformers', 'pyarrow', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(pickled)], check=True)


@pytest.mark.parametrize("row_filter", [None, NoTwos()])
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch, row_filter):
    monkeypatch.setattr("sft_lightning.data.tokenization._RECORDS_AT_ONCE", 256)
    monkeypatch.setattr("sft_lightning.data.filters._RECORDS_AT_ONCE", 256)

    def peak_bytes(num_chunks):
        rows = [{"prompt": "one plus " * 20, "response": "three", "ground_truth": 3}] * (256 * num_chunks)
        file = write_rows(tmp_path / "a.jsonl", rows)
        tracemalloc.start()
        load(file, filter=row_filter)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    # One chunk is read, one encoded and one stored at a time: six fill this line, whichever of the threads is ahead.
    assert peak_bytes(60) < 1.5 * peak_bytes(6)


def test_a_store_can_be_deleted_while_it_is_open(data):
    store = load(data)
    shutil.rmtree(data.parent / "cache")
    assert tokens_of(store[0]) == [1, 3, 2, 4, 5, EOS]
    assert isinstance(store, TokenStore)
