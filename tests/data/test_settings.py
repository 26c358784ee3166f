import dataclasses

import pytest

from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.settings import DataSettings
from sft_lightning.errors import UserError, check_at_least


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"overlength": "cut"}, "data.overlength is 'cut'; give one of drop, error, truncate_prompt"),
        ({"max_length": 1}, "data.max_length is 1; a prompt and a response take at least 2 tokens"),
        ({"max_length": 0}, "data.max_length must be at least 1, got 0"),
        ({"max_examples": 0}, "data.max_train_examples must be at least 1, got 0"),
    ],
)
def test_an_option_out_of_range_is_one_line(option, message):
    for make in (DataSettings, lambda path, **options: dataclasses.replace(DataSettings(path), **options)):
        with pytest.raises(UserError) as error:
            make("rows.jsonl", **option)
        assert str(error.value) == message


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataSettings("rows.jsonl").max_length = 5


def test_saved_rows_are_tokenized_with_the_options_of_the_run():
    run = DataSettings("train.jsonl", columns={"prompt": "q"}, max_length=9, overlength="error", append_eos=False)
    assert run.token_options == {"max_length": 9, "overlength": "error", "append_eos": False}
    saved = DataSettings.of_saved_rows("rows.jsonl", {"step": 3, **run.token_options})
    assert type(saved.template) is Plain
    assert dataclasses.replace(saved, template=None) == DataSettings(
        "rows.jsonl", max_length=9, overlength="error", append_eos=False
    )


def test_an_option_below_the_minimum_is_named():
    check_at_least(1, "data", batch_size=1, max_train_examples=None)
    with pytest.raises(UserError, match=r"^data\.max_length must be at least 1, got 0$"):
        check_at_least(1, "data", batch_size=4, max_length=0)
