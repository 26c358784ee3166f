import torch

from sft_lightning.generation.decoding.kv_cache import KVCache


def states(*rows):
    """One head of one dimension: a row is given by its tokens' numbers. Values are ten times the keys."""
    keys = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
    return keys, 10 * keys


def update(cache, *rows):
    """Returns the keys of every row after an update, as lists, which are equal in all layers."""
    results = [cache.update(*states(*rows), layer) for layer in range(len(cache.layers))]
    for keys, values in results:
        assert torch.equal(values, 10 * keys)
        assert torch.equal(keys, results[0][0])
    return results[0][0][:, 0, :, 0].tolist()


def batch_of(*rows):
    """Returns a cache of rows of equal length, with spare slots."""
    part = KVCache(2)
    update(part, *rows)
    return KVCache.of_parts([part], 0)


def test_without_spare_slots_a_cache_fits_its_tokens():
    cache = KVCache(2)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(2, 0) == (2, 0)
    assert update(cache, [1, 2], [3, 4]) == [[1, 2], [3, 4]]
    assert cache.get_seq_length() == 2
    assert update(cache, [5], [6]) == [[1, 2, 5], [3, 4, 6]]


def test_rows_grow_in_place_and_past_their_spare_slots():
    cache = batch_of([1, 2], [3, 4])
    expected = [[1, 2], [3, 4]]
    places = set()
    for step in range(40):
        expected = [[*row, step + index] for index, row in enumerate(expected)]
        num_slots = cache.num_slots(1)
        got = update(cache, [step], [step + 1])
        assert cache.get_seq_length() == 3 + step
        assert [row[: 3 + step] for row in got] == expected
        assert {value for row in got for value in row[3 + step :]} <= {0}
        assert {len(row) for row in got} == {num_slots}
        assert cache.layers[0].keys.is_contiguous()
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 3  # after 16 tokens, and after 17 more


def test_all_rows_share_the_unchanged_prefix():
    prefix = KVCache(2)
    update(prefix, [7, 8])
    first, second = KVCache(2, prefix), KVCache(2, prefix)
    assert update(first, [1], [2], [3]) == [[7, 8, 1], [7, 8, 2], [7, 8, 3]]
    assert update(second, [4]) == [[7, 8, 4]]
    assert prefix.get_seq_length() == 2


def test_rows_take_the_places_of_those_that_left():
    cache = batch_of([1], [2], [3], [4], [5])
    cache.move_rows(torch.tensor([3, 4]), torch.tensor([0, 2]))
    assert [row[:2] for row in update(cache, [14], [12], [15])] == [[4, 14], [2, 12], [5, 15]]
    for step in range(40):  # past the spare slots, where only three rows are copied
        kept = update(cache, [step], [step], [step])
        assert [row[:3] for row in kept] == [[4, 14, 0], [2, 12, 0], [5, 15, 0]]


def test_parts_of_different_width_are_right_aligned():
    prefix = KVCache(2)
    update(prefix, [9])
    parts = []
    for rows in ([[1, 2, 3]], [[4], [5]]):
        parts.append(KVCache(2, prefix))
        update(parts[-1], *rows)
    cache = KVCache.of_parts(parts, 1)
    assert cache.get_seq_length() == 4
    rows = update(cache, [6], [7], [8])
    assert [row[:5] for row in rows] == [[9, 1, 2, 3, 6], [9, 0, 0, 4, 7], [9, 0, 0, 5, 8]]
    assert [row[5:] for row in rows] == [[0] * 15] * 3


def test_rows_repeat():
    cache = batch_of([1], [2])
    cache.repeat_rows(torch.tensor([0, 0, 1]))
    assert [row[:2] for row in update(cache, [3], [4], [5])] == [[1, 3], [1, 4], [2, 5]]


def test_under_autocast_keys_and_values_are_kept_in_its_precision():
    keys, values = states([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        kept = KVCache(1).update(keys, values, 0)
    assert [each.dtype for each in kept] == [torch.bfloat16] * 2
    assert [each.dtype for each in KVCache(1).update(keys.half(), values.half(), 0)] == [torch.float16] * 2
