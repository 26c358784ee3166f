"""Test BOS, EOS and merges on tokens of real tokenizers."""

import copy

import numpy as np
import pytest
from tokenizers import processors

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.data.formats.base import Record
from sft_lightning.diagnostics.check.rows import Row
from sft_lightning.diagnostics.check.token_boundaries import TokenBoundaries


def look(tokenizer, rows, *, append_eos=True):
    borders = TokenBoundaries("train", tokenizer)
    borders.add(rows)
    return borders, {finding.name: finding for finding in borders.findings(append_eos=append_eos)}


@pytest.fixture
def bos_tokenizer(tokenizer):
    """The tiny tokenizer with a BOS in front of every text."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>"})
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", other.bos_token_id)]
    )
    return other


def row(prompt_ids, response_ids, line=1):
    tokens = np.array([*prompt_ids, *response_ids], dtype=np.int32)
    return Row(Record("p", "r", source=f"f:{line}"), Example.from_prompt(tokens, len(prompt_ids), f"f:{line}"))


def test_rows_that_end_with_eos_are_counted(rows_of, tokenizer):
    rows, *_ = rows_of([("the", " fox"), ("2+2?", " 4")])
    borders, found = look(tokenizer, rows)
    assert (borders.num_eos_supervised, borders.num_rows, found) == (2, 2, {})


def test_without_append_eos_the_model_does_not_learn_to_stop(rows_of, tokenizer):
    rows, *_ = rows_of([("the", " fox"), ("2+2?", " 4")], append_eos=False)
    borders, found = look(tokenizer, rows, append_eos=False)
    assert borders.num_eos_supervised == 0
    assert found["eos_not_supervised"].severity == "error"
    assert found["eos_not_supervised"].fix == "set data.append_eos: true"


def test_some_rows_without_eos_are_a_warning_with_their_lines(tokenizer, lines_of):
    eos = tokenizer.eos_token_id
    _, found = look(tokenizer, [row([5, 6], [7, eos]), row([5, 6], [eos, 7], line=2)])
    assert lines_of(found["eos_not_supervised"]) == [(2,)]
    assert found["eos_not_supervised"].severity == "warning"
    assert lines_of(found["inner_eos"]) == [(2,)]


def test_eos_in_the_prompt_is_allowed(tokenizer):
    eos = tokenizer.eos_token_id
    assert look(tokenizer, [row([eos, 6], [7, eos])])[1] == {}


def test_a_second_bos_is_found_at_either_place(bos_tokenizer, lines_of):
    bos, eos = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    rows = [row([bos, 5], [7, eos]), row([bos, bos, 5], [7, eos], line=2), row([bos, 5], [bos, 7, eos], line=3)]
    found = look(bos_tokenizer, rows)[1]
    assert lines_of(found["double_bos"]) == [(2,), (3,)]
    assert found["double_bos"].severity == "error"


def test_eos_is_allowed_only_at_the_end_of_label_spans(tokenizer, lines_of):
    eos = tokenizer.eos_token_id

    def turns(*sequences, line):
        spans = (LabelSpan(1, 3), LabelSpan(4, 6))
        made = tuple(TokenSequence(np.array(ids, dtype=np.int32), spans) for ids in sequences)
        return Row(Record("p", "r", source=f"f:{line}"), Example(made, f"f:{line}"))

    good = [5, 6, eos, 7, 8, eos]
    rows = [turns(good, good, line=1), turns(good, [5, eos, 6, 7, 8, eos], line=2), turns(good, [*good[:5], 9], line=3)]
    borders, found = look(tokenizer, rows)
    assert borders.num_eos_supervised == 2
    assert {name: lines_of(finding) for name, finding in found.items() if name != "merging_border"} == {
        "inner_eos": [(2,)],
        "eos_not_supervised": [(3,)],
    }


def test_bos_in_the_prompt_text_is_not_doubled(rows_of, bos_tokenizer):
    rows, *_ = rows_of([("<s>the", " fox"), ("<s><s>the", " fox")], max_length=511)
    assert not look(bos_tokenizer, rows)[1].get("double_bos")


def test_texts_that_would_merge_are_counted_with_an_example(rows_of, tokenizer, lines_of):
    rows, *_ = rows_of([("the quick", " fox"), ("the quick ", "fox"), ("the quick", " fox")])
    found = look(tokenizer, rows)[1]
    assert lines_of(found["merging_border"]) == [(2,)]
    assert found["merging_border"].severity == "info"
    assert "e.g. ' ' + 'fo' into ' fo';" in found["merging_border"].message


def test_merges_in_most_rows_are_a_warning(rows_of, tokenizer):
    rows, *_ = rows_of([("the quick ", "fox")] * 2 + [("the quick", " fox")])
    found = look(tokenizer, rows)[1]["merging_border"]
    assert (found.severity, found.count) == ("warning", 2)
