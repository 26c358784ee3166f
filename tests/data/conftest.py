"""Rows that begin alike, for the tests of tries, packing and dealing."""

import numpy as np
import pytest
from hypothesis import strategies as st

from sft_lightning.data.batch import Example


@st.composite
def _families(draw):
    """Rows whose prompts begin like those of earlier rows, or are the same, or the beginning of one."""
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
