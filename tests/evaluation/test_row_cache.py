import torch

from sft_lightning.evaluation.row_cache import RowCache


def states(*rows):
    """One head of one dimension: a row is given by its tokens' numbers. Values are ten times the keys."""
    keys = torch.tensor(rows, dtype=torch.float32)[:, None, :, None]
    return keys, 10 * keys


def update(cache, *rows):
    """Returns the keys of every row after an update, as lists, of all layers alike."""
    results = [cache.update(*states(*rows), layer) for layer in range(len(cache.layers))]
    for keys, values in results:
        assert torch.equal(values, 10 * keys)
        assert torch.equal(keys, results[0][0])
    return results[0][0][:, 0, :, 0].tolist()


def test_rows_grow_in_place_and_past_their_room():
    cache = RowCache(2)
    assert cache.get_seq_length() == 0
    assert update(cache, [1, 2], [3, 4]) == [[1, 2], [3, 4]]
    expected = [[1, 2], [3, 4]]
    for step in range(150):
        expected = [[*row, step + index] for index, row in enumerate(expected)]
        assert update(cache, [step], [step + 1]) == expected
    assert cache.get_seq_length() == 152
    assert cache.get_mask_sizes(1, 0) == (153, 0)


def test_all_rows_begin_with_the_prefix_which_stays_as_it_is():
    prefix = RowCache(2)
    update(prefix, [7, 8])
    first, second = RowCache(2, prefix), RowCache(2, prefix)
    assert update(first, [1], [2], [3]) == [[7, 8, 1], [7, 8, 2], [7, 8, 3]]
    assert update(second, [4]) == [[7, 8, 4]]
    assert update(first, [5], [6], [7]) == [[7, 8, 1, 5], [7, 8, 2, 6], [7, 8, 3, 7]]
    assert prefix.get_seq_length() == 2


def test_rows_take_the_places_of_those_that_left():
    cache = RowCache(2)
    update(cache, [1], [2], [3], [4], [5])
    cache.move_rows(torch.tensor([3, 4]), torch.tensor([0, 2]))
    assert update(cache, [14], [12], [15]) == [[4, 14], [2, 12], [5, 15]]
    for step in range(80):  # past the room, where only three rows are copied
        kept = update(cache, [step], [step], [step])
    assert [row[:2] for row in kept] == [[4, 14], [2, 12], [5, 15]]


def test_parts_of_their_own_width_are_aligned_on_the_right():
    prefix = RowCache(2)
    update(prefix, [9])
    cache = RowCache(2)
    for first, rows in ((0, [[1, 2, 3]]), (1, [[4], [5]])):
        part = RowCache(2, prefix)
        update(part, *rows)
        cache.add_rows(part, first, num_rows=3, num_slots=4, num_prefix=1)
    assert update(cache, [6], [7], [8]) == [[9, 1, 2, 3, 6], [9, 0, 0, 4, 7], [9, 0, 0, 5, 8]]


def test_rows_repeat():
    cache = RowCache(2)
    update(cache, [1], [2])
    cache.repeat_rows(torch.tensor([0, 0, 1]))
    assert update(cache, [3], [4], [5]) == [[1, 3], [1, 4], [2, 5]]


def test_under_autocast_keys_and_values_are_kept_in_its_precision():
    keys, values = states([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        kept = RowCache(1).update(keys, values, 0)
    assert [each.dtype for each in kept] == [torch.bfloat16] * 2
    assert [each.dtype for each in RowCache(1).update(keys.half(), values.half(), 0)] == [torch.float16] * 2
