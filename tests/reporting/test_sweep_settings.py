import pytest

from sft_lightning.errors import UserError
from sft_lightning.reporting.sweep_settings import (
    check_config,
    check_options,
    check_same_config,
    shared_config,
    sizes_of,
)


def test_sizes_are_sorted_and_each_comes_once():
    assert list(sizes_of(["512", "full", "128", "0128"], 7473).items()) == [("128", 128), ("512", 512), ("full", 7473)]


def test_a_number_that_is_all_rows_is_full_where_full_is_asked_for():
    assert sizes_of(["7473", "full"], 7473) == sizes_of(["full", "7473"], 7473) == {"full": 7473}
    assert sizes_of(["7473"], 7473) == {"7473": 7473}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("abc", "--sizes 'abc' is no size: give numbers of training examples, at least 1, or full"),
        ("0", "--sizes '0' is no size: give numbers of training examples, at least 1, or full"),
        ("1.5", "--sizes '1.5' is no size: give numbers of training examples, at least 1, or full"),
        (
            "101",
            "--sizes 101 is more than the 100 rows that data.train_path has to train on; give at most that, or full",
        ),
    ],
)
def test_what_is_no_size_is_named(word, message):
    with pytest.raises(UserError) as error:
        sizes_of(["10", word], 100)
    assert str(error.value) == message


def test_options_that_the_sweep_sets_are_refused():
    check_options(["--data.batch_size", "8", "--output_dirs=x"])
    for option in ("--output_dir", "--ckpt_path=auto", "--data.max_train_examples=3", "--overwrite"):
        with pytest.raises(UserError, match=f"its own {option.partition('=')[0]}: leave it out"):
            check_options(["--data.batch_size", "8", option])


CONFIG = {
    "seed_everything": 42,
    "output_dir": "a",
    "checkpoint": {"dirpath": None},
    "evaluation": {"num_examples": 4, "output_dir": None, "generator": {"init_args": {"greedy": True}}},
    "data": {"val_path": "v", "max_train_examples": 5, "num_workers": 0, "cache_dir": None, "columns": {}},
}
TOKENS = {"data": "d1", "tokenizer": "t1", "max_length": 9}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("checkpoint", {"dirpath": "x"}, r"^checkpoint\.dirpath is set in the config"),
        ("evaluation", {"output_dir": "x"}, r"^evaluation\.output_dir is set in the config"),
        ("evaluation", {"num_examples": 0}, r"evaluation\.num_examples above 0, got v and 0"),
        ("data", {"val_path": None}, r"set data\.val_path, .* got None and 4"),
    ],
)
def test_a_config_that_no_sweep_can_use_is_refused(section, change, message):
    check_config(CONFIG)
    with pytest.raises(UserError, match=message):
        check_config({**CONFIG, section: {**CONFIG[section], **change}})


def test_the_shared_config_is_all_but_what_each_run_has_for_itself():
    assert shared_config(CONFIG, TOKENS) == {
        "seed_everything": 42,
        "checkpoint.dirpath": None,
        "evaluation.num_examples": 4,
        "evaluation.output_dir": None,
        "evaluation.generator.init_args.greedy": True,
        "data.val_path": "v",
        "data.columns": {},
        "the content of data.train_path": "d1",
        "the tokenizer's content": "t1",
    }


def test_a_difference_is_named():
    saved = shared_config(CONFIG, TOKENS)
    check_same_config(saved, shared_config({**CONFIG, "output_dir": "b"}, TOKENS), "s")
    with pytest.raises(UserError, match=r": the content of data\.train_path was 'd1' and is now 'd2';"):
        check_same_config(saved, shared_config(CONFIG, {**TOKENS, "data": "d2"}), "s")
    with pytest.raises(UserError, match="seed_everything was 42 and is now 7; set it back, or name another folder"):
        check_same_config(saved, {**saved, "seed_everything": 7}, "s")
    with pytest.raises(UserError, match=r"model\.new was None and is now 1"):
        check_same_config(saved, {**saved, "model.new": 1}, "s")
