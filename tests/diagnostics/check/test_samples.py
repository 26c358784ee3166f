"""Test the sampled rows and their token pieces."""

import numpy as np
import pytest

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence
from sft_lightning.diagnostics.check.samples import draw_samples


@pytest.fixture
def store_of(rows_of):
    """Returns the token store of texts."""

    def make(texts, **options):
        return rows_of(texts, **options)[2].load_tokens()

    return make


def test_the_same_seed_draws_the_same_five_rows(store_of, tokenizer):
    store = store_of([(f"row {number}", " 1") for number in range(40)])
    drawn = draw_samples(store, tokenizer, seed=1)
    lines = [int(sample.source.rpartition(":")[2]) for sample in drawn]
    assert len(lines) == 5
    assert lines == sorted(lines)
    assert drawn == draw_samples(store, tokenizer, seed=1)
    assert drawn != draw_samples(store, tokenizer, seed=2)


def test_pieces_are_tokens_and_concatenate_to_the_text(store_of, tokenizer):
    (sample,) = draw_samples(store_of([("the quick\n", " fox 12")]), tokenizer, seed=0)
    assert sample.prompt.head == ["the", " qu", "ick", "\n"]
    assert sample.response.head == [" fo", "x", " 1", "2"]
    assert sample.eos == "<|endoftext|>"
    assert (sample.num_prompt_tokens, sample.num_response_tokens) == (4, 5)


def test_tokens_of_one_character_are_one_piece(store_of, tokenizer):
    (sample,) = draw_samples(store_of([("a\U0001f600b", " \u4e2d")]), tokenizer, seed=0)
    assert sample.prompt.head == ["a", "\U0001f600", "b"]
    assert "".join(sample.response.head) == " \u4e2d"
    assert sample.num_prompt_tokens == 6


def test_the_middle_of_a_long_text_is_counted_not_shown(store_of, tokenizer):
    (sample,) = draw_samples(store_of([("z" * 200, " 1")]), tokenizer, seed=0)
    assert (len(sample.prompt.head), sample.prompt.num_left_out, len(sample.prompt.tail)) == (60, 80, 60)
    assert "".join(sample.prompt.tail) == "z" * 60


def test_a_row_without_eos_has_none(store_of, tokenizer):
    (sample,) = draw_samples(store_of([("a", " b")], append_eos=False), tokenizer, seed=0)
    assert sample.eos is None
    assert "".join(sample.response.head) == " b"


def test_the_last_span_of_several_sequences_is_shown(tokenizer):
    texts = ["the quick", " fox", " 12", " again"]
    parts = [tokenizer(text)["input_ids"] for text in texts]
    ends = [sum(map(len, parts[:number])) for number in range(1, 5)]
    tokens = np.array([token for part in parts for token in part], dtype=np.int32)
    first = TokenSequence(tokens[: ends[1]], (LabelSpan(ends[0], ends[1]),))
    last = TokenSequence(tokens, (LabelSpan(ends[0], ends[1]), LabelSpan(ends[2], ends[3])))
    (sample,) = draw_samples([Example((first, last), "f:1")], tokenizer, seed=0)
    assert "".join(sample.prompt.head) == "the quick fox 12"
    assert "".join(sample.response.head) == " again"
    assert (sample.num_prompt_tokens, sample.num_response_tokens) == (ends[2], len(parts[3]))
