"""Digests against values from the sha256sum of coreutils."""

from sft_lightning.system.files import file_digest, files_digest, value_digest

OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == OF_ABC


def test_of_several_files_goes_by_their_order_and_not_by_where_one_ends(tmp_path):
    for name, content in {"a": b"abc", "b": b"", "c": b"ab", "d": b"c"}.items():
        (tmp_path / name).write_bytes(content)
    orders = ("a", "ab", "ba", "cd")
    assert len({files_digest([tmp_path / name for name in order]) for order in orders}) == len(orders)


def test_of_a_value():
    assert value_digest({"b": 1, "a": [None]}) == value_digest({"a": [None], "b": 1})
    assert value_digest("") == "12ae32cb1ec02d01eda3581b127c1fee3b0dc53572ed6baf239721a03d82e126"  # of two quotes
