"""Generate rows with common prefixes for the tests of tries, layouts and balancing."""

import numpy as np
import pytest
from hypothesis import strategies as st

from sft_lightning.data.batch import Example, LabelSpan, TokenSequence


@st.composite
def _families(draw):
    """Rows whose prompts equal, extend or begin those of earlier rows, or share a prefix with them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([2, 1000]))
    prompts = [rng.integers(1, vocabulary + 1, draw(st.integers(1, 60)))]
    for _ in range(draw(st.integers(0, 11))):
        stem = prompts[rng.integers(len(prompts))]
        stem = stem[: draw(st.sampled_from([0, 5, 15, 16, 17, 20, 32, 40, 100]))]
        tail = rng.integers(1, vocabulary + 1, draw(st.sampled_from([0, 0, 1, 3, 16, 40])))
        prompts.append(np.concatenate([stem, tail])) if len(stem) + len(tail) else prompts.append(prompts[0])
    num_labels = [draw(st.sampled_from([1, 1, 2, 9])) for _ in prompts]
    rows = zip(prompts, num_labels, strict=True)
    return [_example(prompt, rng.integers(1, vocabulary + 1, count)) for prompt, count in rows]


def _example(prompt, response):
    return Example.from_prompt(np.concatenate([prompt, response]).astype(np.int32), len(prompt))


@pytest.fixture(scope="session")
def families():
    """A strategy for lists of examples, of which most share the beginning of their prompts with others."""
    return _families()


@st.composite
def _conversations(draw):
    """Rows of one to three sequences with one to four label spans, most of which continue an earlier sequence."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocabulary = draw(st.sampled_from([2, 1000]))
    earlier = [rng.integers(1, vocabulary + 1, 30)]

    def sequence():
        stem = earlier[rng.integers(len(earlier))]
        parts, spans = [stem[: draw(st.sampled_from([0, 3, 16, 17, 40, 200]))]], []
        length = len(parts[0])
        if length > 4 and draw(st.booleans()):  # a label span among the tokens that others may share
            start = draw(st.integers(1, length - 2))
            spans.append(LabelSpan(start, draw(st.integers(start + 1, length)), draw(weights)))
        for _ in range(draw(st.integers(1, 4 - len(spans)))):
            num_context, num_labels = draw(st.sampled_from([0, 1, 2, 20])), draw(st.sampled_from([1, 2, 20]))
            num_context = max(num_context, 0 if length else 1)
            parts.append(rng.integers(1, vocabulary + 1, num_context + num_labels))
            spans.append(LabelSpan(length + num_context, length + num_context + num_labels, draw(weights)))
            length = spans[-1].end
        tokens = np.concatenate(parts).astype(np.int32)
        earlier.append(tokens)
        return TokenSequence(tokens, tuple(spans))

    return [
        Example(tuple(sequence() for _ in range(draw(st.integers(1, 3)))), f"rows.jsonl:{line}")
        for line in range(1, draw(st.integers(1, 6)) + 1)
    ]


weights = st.sampled_from([1.0, 0.5, 0.0, 2.25])


@pytest.fixture(scope="session")
def conversations():
    """A strategy for lists of examples of several sequences and label spans."""
    return _conversations()


@pytest.fixture(scope="session")
def labels_of():
    """Returns, sorted, (row, tokens before the label, label, weight) of every label that some examples have."""

    def labels_of(examples, row_weights):
        return sorted(
            (row, tuple(tokens[:position].tolist()), int(tokens[position]), row_weight * weight)
            for row, (example, row_weight) in enumerate(zip(examples, row_weights, strict=True))
            for tokens, label_spans in example.sequences
            for start, end, weight in label_spans
            for position in range(start, end)
        )

    return labels_of
