import pytest

from sft_lightning.data.formats.detect import template_for, template_named
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.errors import UserError


@pytest.mark.parametrize(
    ("keys", "template"),
    [
        ({"prompt", "response"}, Plain),
        ({"question", "answer", "id"}, R1Zero),
        ({"prompt", "response", "question", "answer"}, Plain),
    ],
)
def test_keys_choose_the_template(keys, template):
    assert type(template_for(keys)) is template


def test_keys_without_a_template_are_listed_with_a_fix():
    with pytest.raises(UserError) as error:
        template_for({"output", "instruction"})
    assert str(error.value).startswith("found the keys ['instruction', 'output'], expected 'prompt' and 'response'")
    assert "data.columns" in str(error.value)


@pytest.mark.parametrize(("name", "template"), [("Plain", Plain), ("R1Zero", R1Zero)])
def test_a_template_is_found_by_name(name, template):
    assert type(template_named(name)) is template


def test_an_unknown_template_name_lists_the_known_ones():
    with pytest.raises(UserError, match="template 'R2' is unknown; choose auto, Plain or R1Zero"):
        template_named("R2")
