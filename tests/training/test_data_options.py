import pytest

from sft_lightning.errors import UserError
from sft_lightning.training.data_options import check_at_least, check_same_steps, sets_of_run


def test_an_option_below_the_least_is_named():
    check_at_least(1, batch_size=1, max_train_examples=None)
    with pytest.raises(UserError, match=r"^data\.max_length must be at least 1, got 0$"):
        check_at_least(1, batch_size=4, max_length=0)


def test_equal_steps_pass_and_a_difference_is_named():
    check_same_steps({"data.seed": 7}, {"data.seed": 7})
    with pytest.raises(UserError, match=r"^cannot resume: data\.seed is 8, the checkpoint was trained with 7; set it"):
        check_same_steps({"a": 1, "data.seed": 8}, {"a": 1, "data.seed": 7})


def test_a_name_that_one_side_lacks_is_a_difference():
    with pytest.raises(UserError, match="the filter is 'x', the checkpoint was trained with None"):
        check_same_steps({"the filter": "x"}, {})
    with pytest.raises(UserError, match="the filter is None, the checkpoint was trained with 'x'"):
        check_same_steps({}, {"the filter": "x"})


def test_which_sets_a_run_reads():
    every = {"train": "a", "val": "b", "test": "c"}
    only_train = {"train": "a", "val": None, "test": None}
    assert sets_of_run("fit", every) == ["train", "val"]
    assert sets_of_run("fit", only_train) == ["train"]
    assert sets_of_run("validate", every) == ["val"]
    assert sets_of_run("test", every) == ["test"]
    assert sets_of_run("predict", only_train) == []
    assert sets_of_run("validate", only_train) == ["val"], "needed, there or not"
