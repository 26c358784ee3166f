"""Test the whole path from arbitrary rows to micro-batches: every step, replica and mask."""

import json
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sft_lightning.data.batching.loader import MicroBatches, TrainingShare
from sft_lightning.data.batching.plan import EpochPlan, StepShape
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.data.tokenization import tokenize_prompt_and_output

PAD, EOS = 1, 0
CONSTANT = 2.5
STEMS = ("", "a preamble that is long enough to be worth a segment of its own, for it has more tokens than that: ", "Q")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
filled_texts = texts.filter(lambda text: text.strip())
rows = st.lists(
    st.fixed_dictionaries(
        {"stem": st.sampled_from(STEMS), "prompt": filled_texts, "response": filled_texts},
        optional={"weight": st.sampled_from([0, 0.25, 1, 3.5])},
    ),
    min_size=1,
    max_size=14,
)
shapes = st.builds(StepShape, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@st.composite
def epochs(draw):
    """A store's rows as text, and the micro-batches of an epoch as [replica][index]."""
    written, shape = draw(rows), draw(shapes)
    layout = draw(st.sampled_from(["padded", "packed", "shared_prefix"]))
    mode = draw(st.sampled_from(["token", "sequence", "constant", "micro_batch"]))
    multiple = draw(st.sampled_from([None, 8]))
    for row in written:
        row["prompt"] = row.pop("stem") + row["prompt"]
    return written, shape, layout, mode, multiple, draw(st.integers(0, 3))


def expected_rows(written, tokenizer):
    """[(ids, prompt length, record weight)], by the tokenizer's own call."""
    encoded = []
    for row in written:
        prompt, response = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "response")
        )
        encoded.append(([*prompt, *response, EOS], len(prompt), row.get("weight", 1)))
    return encoded


def micro_batches_of(store, shape, layout, mode, multiple, epoch):
    plan = EpochPlan(
        store.input_lengths,
        store.label_lengths,
        store.weights,
        shape=shape,
        seed=3,
        epoch=epoch,
        normalization=mode,
        normalize_constant=CONSTANT,
        layout=layout,
        prefixes_of=store.prefixes,
    )
    options = {"pad_token_id": PAD, "pad_to_multiple_of": multiple, "layout": layout}
    loaders = [
        MicroBatches(store, TrainingShare(plan, replica), plan.num_micro_batches, **options)
        for replica in range(shape.num_replicas)
    ]
    return [[loader[index] for index in range(len(loader))] for loader in loaders]


def rows_in(batch):
    """Yields (line, input ids, prompt length, labels, loss weights) of each row, read off the batch's own positions.

    In a padded batch row i is row i of the input; in a packed one a row is the chain of tree that its labels end in.
    """
    width = batch.input_ids.shape[1]
    for row, source in enumerate(batch.sources):
        mine = batch.label_rows == row
        positions = batch.label_positions[mine].tolist()
        if batch.segments is None:
            assert {position // width for position in positions} == {row}
            chain = list(range(row * width, positions[-1] + 1))
        else:
            chain, tree = [], batch.segments.tree
            inside = next(number for number, segment in enumerate(tree) if segment.start <= positions[-1] < segment.end)
            last = positions[-1]
            while inside >= 0:
                chain = [*range(tree[inside].start, last + 1), *chain]
                inside = tree[inside].parent
                last = tree[inside].end - 1
            assert batch.position_ids[0, chain].tolist() == list(range(len(chain)))
        ids = batch.input_ids.flatten()[chain].tolist()
        weights = set(batch.loss_weights[mine].tolist())
        assert len(weights) == 1
        # Labels are consecutive positions at the end of the row, and nowhere else.
        assert positions == chain[-len(positions) :]
        yield int(source.rpartition(":")[2]), ids, len(ids) + 1 - len(positions), batch.labels[mine].tolist(), *weights


def expected_weight(mode, labels_by_micro_batch, mine, num_labels):
    """The table of loss weights, in fractions."""
    counted = [labels for labels in labels_by_micro_batch if labels]
    num_rows = sum(map(len, counted))
    return {
        "token": Fraction(1, sum(map(sum, counted))),
        "sequence": Fraction(1, num_rows * num_labels),
        "constant": 1 / (num_rows * Fraction(CONSTANT)),
        "micro_batch": Fraction(1, len(counted) * sum(labels_by_micro_batch[mine])),
    }[mode]


@given(epochs())
@hypothesis_settings(deadline=None, max_examples=60)
def test_every_row_is_in_an_epoch_once_with_its_weight(tokenizer, epoch):
    written, shape, layout, mode, multiple, number = epoch
    expected = expected_rows(written, tokenizer)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        settings = DataSettings(path, max_length=1000, cache_dir=Path(folder) / "cache")
        stores = [load_or_build_tokens(settings, tokenizer) for _ in range(2)]  # built, then read from the cache
        for store in stores:
            found = [store[index].sequences for index in range(len(store))]
            assert [(sequence.tokens.tolist(), sequence.label_spans) for (sequence,) in found] == [
                (ids, ((prompt_length, len(ids), 1.0),)) for ids, prompt_length, _ in expected
            ]
            assert store.weights.tolist() == [weight for *_, weight in expected]
        replicas = micro_batches_of(stores[1], shape, layout, mode, multiple, number)

    num_steps = -(-len(written) // shape.examples_per_step)
    assert {len(batches) for batches in replicas} == {num_steps * shape.num_micro_batches}
    seen = []
    for step in range(num_steps):
        first = step * shape.num_micro_batches
        step_batches = [batch for batches in replicas for batch in batches[first : first + shape.num_micro_batches]]
        found = [list(rows_in(batch)) for batch in step_batches]
        assert sum(map(len, found)) == min(shape.examples_per_step, len(written) - step * shape.examples_per_step)
        labels_by_micro_batch = [[len(labels) for *_, labels, _ in batch] for batch in found]
        for mine, batch in enumerate(found):
            for line, ids, prompt_length, labels, weight in batch:
                tokens, expected_prompt_length, record_weight = expected[line - 1]
                assert (ids, prompt_length) == (tokens[:-1], expected_prompt_length)
                assert labels == tokens[prompt_length:]
                share = expected_weight(mode, labels_by_micro_batch, mine, len(labels))
                assert weight == pytest.approx(float(share * Fraction(record_weight)), rel=1e-14)
                seen.append(line)
        for batch in step_batches:
            assert batch.num_rows or float(batch.loss_weights.sum()) == 0.0
    assert sorted(seen) == list(range(1, len(written) + 1))


@given(st.lists(st.tuples(filled_texts, filled_texts), min_size=1, max_size=6))
@hypothesis_settings(deadline=None, max_examples=100)
def test_response_mask_is_true_only_on_responses(tokenizer, pairs):
    prompts, outputs = zip(*pairs, strict=True)
    batch = tokenize_prompt_and_output(list(prompts), list(outputs), tokenizer)
    for row, pair in enumerate(pairs):
        prompt, output = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair)
        ids, mask = [*prompt, *output], batch["response_mask"][row].tolist()
        assert batch["input_ids"][row].tolist()[: len(ids) - 1] == ids[:-1]
        assert np.array(batch["labels"][row])[mask].tolist() == output
        assert mask == [index in range(len(prompt) - 1, len(ids) - 1) for index in range(len(mask))]
