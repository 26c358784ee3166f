import pickle
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_lightning.data.batch import Example
from sft_lightning.data.batching.plan import (
    EpochPlan,
    StepShape,
    epoch_size,
    label_weights,
    num_steps,
    shuffled,
    validation_batches,
)

MODES = ["token", "sequence", "constant", "micro_batch"]
LAYOUTS = ["padded", "packed", "shared_prefix"]
PREAMBLE = list(range(20))


def plan_of(total_lengths, label_lengths=None, weights=None, *, shape, **options):
    total_lengths = np.asarray(total_lengths, dtype=np.int64)
    labels = np.ones_like(total_lengths) if label_lengths is None else np.asarray(label_lengths, dtype=np.int64)
    weights = np.ones(len(total_lengths)) if weights is None else np.asarray(weights, dtype=np.float64)
    return EpochPlan(total_lengths - 1, labels, weights, shape=StepShape(*shape), **{"seed": 1, "epoch": 0} | options)


def prefixes_of(index):
    """One of five questions behind one preamble. At the top of the file, so that it can be pickled."""
    return Example.from_prompt(np.array([*PREAMBLE, *[100 + index % 5] * 20, *[1] * 10]), 40).prefixes


def lengths_for(num_examples, seed=0):
    return np.random.default_rng(seed).integers(2, 50, num_examples)


def steps_of(plan, shape):
    """Returns, for each step, its micro-batches as [position][replica]."""
    _, num_positions, num_replicas = shape
    micro_batches = [[plan.micro_batch(r, i) for r in range(num_replicas)] for i in range(plan.num_micro_batches)]
    return [micro_batches[start : start + num_positions] for start in range(0, len(micro_batches), num_positions)]


def members(step):
    return sorted(int(example) for position in step for each in position for example in each.examples)


def weight_by_example(step):
    micro_batches = [each for position in step for each in position]
    return {
        int(row): float(w) for each in micro_batches for row, w in zip(each.examples, each.label_weights, strict=True)
    }


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
limits = st.none() | st.integers(1, 12)


# Who is in a step


def test_the_order_matches_that_of_older_checkpoints():
    # Frozen: another order would change the data under a run that is resumed.
    assert shuffled(10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert shuffled(10, 42, 1).tolist() == [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]
    assert shuffled(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_the_order_is_a_permutation(num_examples, seed, epoch):
    assert sorted(shuffled(num_examples, seed, epoch).tolist()) == list(range(num_examples))


def test_every_example_can_come_anywhere():
    firsts = np.bincount([shuffled(4, 7, epoch)[0] for epoch in range(400)], minlength=4)
    assert firsts.min() > 60  # 100 expected, and 60 is 4.6 standard deviations below


def test_steps_cut_the_order_and_the_last_may_be_short():
    shape = (2, 2, 1)
    plan = plan_of([5] * 10, shape=shape, seed=42)
    assert [plan.step_examples(step).tolist() for step in range(3)] == [[4, 8, 1, 9], [3, 6, 0, 7], [2, 5]]
    assert (plan.num_steps, plan.num_micro_batches) == (3, 6)
    assert [members(step) for step in steps_of(plan, shape)] == [[1, 4, 8, 9], [0, 3, 6, 7], [2, 5]]


@given(st.integers(1, 90), shapes, limits, st.integers(0, 99), st.integers(0, 5))
def test_every_example_once_in_even_micro_batches_for_any_numbers(num_examples, shape, limit, seed, epoch):
    batch_size, num_positions, num_replicas = shape
    options = {"shape": shape, "seed": seed, "epoch": epoch}
    plan = plan_of(lengths_for(num_examples), **options, max_micro_batches=limit)
    steps = steps_of(plan, shape)
    whole_steps = -(-num_examples // (batch_size * num_positions * num_replicas))
    num_used = num_examples if limit is None else min(num_examples, limit * batch_size * num_replicas)

    assert plan.num_micro_batches == min(whole_steps * num_positions, limit or 10**9)
    assert plan.num_steps == len(steps)
    everyone = [example for step in steps for example in members(step)]
    assert sorted(everyone) == sorted(shuffled(num_examples, seed, epoch)[:num_used].tolist())
    assert plan.num_examples == num_used
    for step in steps:
        sizes = [len(each.examples) for position in step for each in position]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) > 0
    for step in steps[:-1]:
        assert len(members(step)) == batch_size * num_positions * num_replicas


@given(st.data())
def test_members_follow_from_seed_epoch_and_examples_per_step_alone(data):
    examples_per_step = data.draw(st.sampled_from([1, 4, 6, 12, 24]))
    num_examples, seed, epoch = (data.draw(st.integers(low, high)) for low, high in ((1, 80), (0, 50), (0, 5)))
    divisors = [d for d in range(1, examples_per_step + 1) if examples_per_step % d == 0]

    def drawn_steps():
        batch_size = data.draw(st.sampled_from(divisors))
        per_batch = examples_per_step // batch_size
        num_replicas = data.draw(st.sampled_from([d for d in divisors if per_batch % d == 0]))
        shape = (batch_size, per_batch // num_replicas, num_replicas)
        lengths = lengths_for(num_examples, data.draw(st.integers(0, 9)))
        mode = data.draw(st.sampled_from(MODES))
        plan = plan_of(lengths, lengths - 1, shape=shape, seed=seed, epoch=epoch, normalization=mode)
        return [members(step) for step in steps_of(plan, shape)]

    assert drawn_steps() == drawn_steps()


def test_another_seed_epoch_or_step_size_is_another_first_step():
    def first(seed, epoch, shape):
        return members(steps_of(plan_of([5] * 60, shape=shape, seed=seed, epoch=epoch), shape)[0])

    of_one = first(1, 0, (2, 2, 2))
    assert first(2, 0, (2, 2, 2)) != of_one
    assert first(1, 1, (2, 2, 2)) != of_one
    assert set(first(1, 0, (2, 4, 2))) > set(of_one)


def test_a_limit_on_micro_batches_keeps_earlier_steps():
    shape = (4, 8, 1)
    lengths = lengths_for(100)
    whole, limited = (steps_of(plan_of(lengths, shape=shape, max_micro_batches=m), shape) for m in (None, 10))
    assert [len(members(step)) for step in whole] == [32, 32, 32, 4]
    assert [len(members(step)) for step in limited] == [32, 8]
    assert members(limited[0]) == members(whole[0])
    assert [len(position[0].examples) for position in limited[1]] == [4, 4]


def test_a_limit_beyond_the_end_changes_nothing():
    shape = (2, 3, 2)
    whole, limited = (plan_of(lengths_for(29), shape=shape, max_micro_batches=m) for m in (None, 1000))
    assert whole.num_micro_batches == limited.num_micro_batches == 9
    for ours, theirs in zip(steps_of(whole, shape), steps_of(limited, shape), strict=True):
        assert weight_by_example(ours) == weight_by_example(theirs)


def test_a_limit_of_nothing_is_an_epoch_of_nothing():
    plan = plan_of([5, 5], shape=(1, 1, 1), max_micro_batches=0)
    assert (plan.num_steps, plan.num_micro_batches) == (0, 0)


@pytest.mark.parametrize(("num_examples", "steps"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (7473, 234)])
def test_number_of_steps_of_the_guides_shape(num_examples, steps):
    assert num_steps(num_examples, StepShape(4, 8, 1)) == steps
    assert num_steps(num_examples, StepShape(2, 4, 4)) == steps


def test_a_row_without_labels_is_refused():
    with pytest.raises(AssertionError, match="without labels"):
        plan_of([5, 5], [1, 0], shape=(1, 1, 1))


# How a step is distributed


def test_longest_rows_come_first_side_by_side_on_replicas():
    # By length: example 1 has 10 tokens, 3 has 20, 5, 7, 6, 4, 2, and 0 has 80.
    plan = plan_of([80, 10, 70, 20, 60, 30, 50, 40], shape=(2, 2, 2))
    (first, second) = steps_of(plan, (2, 2, 2))[0]
    assert [sorted(each.examples.tolist()) for each in first] == [[0, 2], [4, 6]]
    assert [sorted(each.examples.tolist()) for each in second] == [[5, 7], [1, 3]]


def test_surplus_micro_batches_are_empty_and_last():
    plan = plan_of([10, 90], shape=(2, 2, 2))
    (first, second) = steps_of(plan, (2, 2, 2))[0]
    assert [each.examples.tolist() for each in first] == [[1], [0]]
    assert [each.examples.tolist() for each in second] == [[], []]
    assert [each.label_weights.tolist() for each in first + second] == [[0.5], [0.5], [], []]


def test_one_row_among_many_replicas():
    plan = plan_of([10], [4], shape=(4, 2, 8))
    assert plan.num_micro_batches == 2
    assert [len(plan.micro_batch(replica, 0).examples) for replica in range(8)] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert [len(plan.micro_batch(replica, 1).examples) for replica in range(8)] == [0] * 8
    assert plan.micro_batch(0, 0).label_weights.tolist() == [0.25]


@given(st.integers(1, 60), shapes, st.integers(0, 9))
def test_row_lengths_never_increase_across_micro_batches(num_examples, shape, seed):
    lengths = lengths_for(num_examples, seed)
    for step in steps_of(plan_of(lengths, shape=shape), shape):
        groups = [lengths[each.examples] for position in step for each in position if len(each.examples)]
        assert all(earlier.min() >= later.max() for earlier, later in pairwise(groups))


def test_random_numbers_of_micro_batches_differ_and_come_again():
    def seeds(**options):
        plan = plan_of([5] * 24, shape=(1, 2, 2), **options)
        return [plan.micro_batch(replica, index).rng_seed for index in range(12) for replica in range(2)]

    drawn = seeds() + seeds(epoch=1) + seeds(seed=2)
    assert len(set(drawn)) == 72
    assert drawn[:24] == seeds()
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in drawn)


# Layouts


@given(st.integers(1, 60), shapes, limits, st.integers(0, 9))
def test_a_layout_changes_who_computes_a_row_and_nothing_else(num_examples, shape, limit, seed):
    totals = lengths_for(num_examples, seed) + 40
    options = {"shape": shape, "seed": seed, "max_micro_batches": limit, "prefixes_of": prefixes_of}
    plans = {layout: plan_of(totals, totals - 40, **options, layout=layout) for layout in LAYOUTS}
    steps = {layout: steps_of(plan, shape) for layout, plan in plans.items()}
    seeds = {layout: [each.rng_seed for s in steps[layout] for p in s for each in p] for layout in LAYOUTS}
    for layout in ("packed", "shared_prefix"):
        assert [members(step) for step in steps[layout]] == [members(step) for step in steps["padded"]]
        assert [weight_by_example(s) for s in steps[layout]] == [weight_by_example(s) for s in steps["padded"]]
        assert seeds[layout] == seeds["padded"]
        for step in steps[layout]:
            filled = [len(each.examples) > 0 for position in step for each in position]
            assert sum(filled) == min(len(filled), len(members(step)))
            assert filled == sorted(filled, reverse=True)


@given(st.integers(1, 60), shapes, st.integers(0, 9))
def test_packed_micro_batches_have_about_the_same_tokens_costliest_first(num_examples, shape, seed):
    totals = lengths_for(num_examples, seed)
    for step in steps_of(plan_of(totals, shape=shape, layout="packed"), shape):
        costs = [int((totals[each.examples] - 1).sum()) for position in step for each in position]
        assert costs == sorted(costs, reverse=True)
        assert costs[0] - costs[-1] <= max(totals[members(step)]) - 1


def test_rows_with_a_common_prompt_share_a_micro_batch():
    shape = (2, 5, 1)
    plan = plan_of([50] * 10, shape=shape, layout="shared_prefix", prefixes_of=prefixes_of)
    (step,) = steps_of(plan, shape)
    assert sorted(sorted(each.examples.tolist()) for (each,) in step) == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]


def test_a_step_is_balanced_once_for_all_micro_batches():
    asked = []

    def counted(index):
        asked.append(index)
        return prefixes_of(index)

    shape = (2, 2, 2)
    plan = plan_of([50] * 16, shape=shape, layout="shared_prefix", prefixes_of=counted)
    steps_of(plan, shape)
    assert sorted(asked) == list(range(16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_travels_to_other_processes_at_any_time(layout):
    def drawn(plan):
        return [
            (each.examples.tolist(), each.label_weights.tolist()) for each in map(plan.micro_batch, [0] * 4, range(4))
        ]

    plan = plan_of(lengths_for(16) + 40, shape=(4, 2, 1), layout=layout, prefixes_of=prefixes_of)
    before = pickle.loads(pickle.dumps(plan))
    assert drawn(plan) == drawn(before) == drawn(pickle.loads(pickle.dumps(plan)))


@given(st.integers(1, 90), shapes, limits)
def test_the_size_of_an_epoch_is_known_without_a_plan(num_examples, shape, limit):
    plan = plan_of([5] * num_examples, shape=shape, max_micro_batches=limit)
    steps = steps_of(plan, shape)
    rows = sum(len(members(step)) for step in steps)
    assert epoch_size(num_examples, StepShape(*shape), limit) == (rows, len(steps), plan.num_micro_batches)


def test_an_epoch_is_shuffled_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("sft_lightning.data.batching.plan.shuffled", lambda *_: pytest.fail("shuffled too early"))
    assert plan_of([5] * 10, shape=(2, 2, 1)).num_steps == 3


# Loss weights

# Sorted by length and cut in two, longest first: micro-batch 0 is example 2, micro-batch 1 is examples 0 and 1.
TOTALS, LABELS, WEIGHTS = [10, 20, 30], [1, 2, 4], [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token", {2: 2 / 7, 0: 1 / 7, 1: 0.5 / 7}),
        ("sequence", {2: 2 / (3 * 4), 0: 1 / 3, 1: 0.5 / (3 * 2)}),
        ("constant", {2: 2 / 30, 0: 1 / 30, 1: 0.5 / 30}),
        ("micro_batch", {2: 2 / (2 * 4), 0: 1 / (2 * 3), 1: 0.5 / (2 * 3)}),
    ],
)
def test_weights_worked_out_by_hand(mode, expected):
    shape = (2, 2, 1)
    plan = plan_of(TOTALS, LABELS, WEIGHTS, shape=shape, normalization=mode, normalize_constant=10.0)
    (step,) = steps_of(plan, shape)
    assert [sorted(position[0].examples.tolist()) for position in step] == [[2], [0, 1]]
    assert weight_by_example(step) == pytest.approx(expected, rel=1e-15)


def reference_weights(step, labels, weights, mode, constant):
    """The table of the design in fractions, from nothing but who sits in which micro-batch."""
    groups = [each.examples.tolist() for position in step for each in position]
    rows = [row for group in groups for row in group]
    num_tokens = sum(labels[row] for row in rows)
    num_non_empty = len([group for group in groups if group])
    expected = {}
    for group in groups:
        for row in group:
            count = {
                "token": num_tokens,
                "sequence": len(rows) * labels[row],
                "constant": len(rows) * Fraction(constant),
                "micro_batch": num_non_empty * sum(labels[other] for other in group),
            }[mode]
            expected[row] = float(Fraction(weights[row]) / count)
    return expected


@given(st.integers(1, 60), shapes, limits, st.sampled_from(MODES), st.sampled_from(LAYOUTS), st.integers(0, 9))
def test_weights_are_those_of_the_formulas(num_examples, shape, limit, mode, layout, seed):
    totals = lengths_for(num_examples, seed) + 40
    labels = [int(value) for value in np.random.default_rng(seed + 1).integers(1, totals)]
    weights = [float(value) for value in np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 3.0], num_examples)]
    options = {"normalization": mode, "normalize_constant": 2.5, "max_micro_batches": limit}
    options |= {"layout": layout, "prefixes_of": prefixes_of}
    plan = plan_of(totals, labels, weights, shape=shape, **options)
    for step in steps_of(plan, shape):
        expected = reference_weights(step, labels, weights, mode, 2.5)
        assert weight_by_example(step) == pytest.approx(expected, rel=1e-14)


@given(st.integers(1, 60), st.sampled_from(["token", "sequence", "constant"]))
def test_weights_do_not_depend_on_the_balancing(num_examples, mode):
    totals = lengths_for(num_examples)

    def weights(shape):
        plan = plan_of(totals, totals - 1, shape=shape, normalization=mode)
        return [weight_by_example(step) for step in steps_of(plan, shape)]

    by_shape = [weights(shape) for shape in ((12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2))]
    assert by_shape[1:] == by_shape[:1] * 3


@pytest.mark.parametrize("mode", ["token", "sequence", "micro_batch"])
def test_label_losses_of_one_give_a_step_loss_of_one(mode):
    totals = lengths_for(50)
    plan = plan_of(totals, totals - 1, shape=(3, 2, 2), normalization=mode)
    for step in steps_of(plan, (3, 2, 2)):
        step_loss = sum(weight * (totals[example] - 1) for example, weight in weight_by_example(step).items())
        assert step_loss == pytest.approx(1.0, rel=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_halving_every_record_weight_halves_every_loss_weight(mode):
    def weights(record_weight):
        plan = plan_of(TOTALS, LABELS, [record_weight] * 3, shape=(2, 2, 1), normalization=mode)
        return weight_by_example(steps_of(plan, (2, 2, 1))[0])

    assert weights(0.5) == {example: weight / 2 for example, weight in weights(1.0).items()}


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_micro_batch_has_no_weights(mode):
    weights = label_weights(mode, [np.array([3]), np.array([], dtype=np.int64)], 1, 1.0)
    assert (weights.shape, weights.dtype) == ((0,), np.float64)


# Validation


def test_validation_is_distributed_longest_first():
    lengths = np.array([5, 9, 7, 1, 3])
    assert [b.tolist() for b in validation_batches(lengths, 2, 1, 0)] == [[1, 2], [0, 4], [3]]
    assert [b.tolist() for b in validation_batches(lengths, 2, 2, 0)] == [[1, 2], [3]]
    assert [b.tolist() for b in validation_batches(lengths, 2, 2, 1)] == [[0, 4], []]


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
def test_packed_validation_keeps_the_order_of_the_file(layout):
    lengths = np.array([5, 9, 7, 1, 3])
    assert [b.tolist() for b in validation_batches(lengths, 2, 1, 0, layout=layout)] == [[0, 1], [2, 3], [4]]
    assert [b.tolist() for b in validation_batches(lengths, 2, 2, 1, layout=layout)] == [[2, 3], []]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6), st.sampled_from(LAYOUTS))
def test_validation_has_each_example_once_and_equally_many_batches(num_examples, batch_size, num_replicas, layout):
    lengths = lengths_for(num_examples)
    shares = [validation_batches(lengths, batch_size, num_replicas, r, layout=layout) for r in range(num_replicas)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-num_examples // (batch_size * num_replicas))
    everyone = [int(example) for share in shares for batch in share for example in batch]
    assert sorted(everyone) == list(range(num_examples))
    assert all(len(batch) <= batch_size for share in shares for batch in share)
