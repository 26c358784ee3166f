import pytest
import torch

from sft_lightning.errors import UserError
from sft_lightning.system.saved_values import require_form

LIKE = {"count": 0, "name": "", "norms": [0.0], "any": None, "inner": {"score": torch.zeros(())}, "free": []}
GOOD = {
    "count": 3,
    "name": "x",
    "norms": (1, 2.5),
    "any": [1],
    "inner": {"score": torch.ones(1), "more": 1},
    "free": [1, "a"],
}


def test_a_value_of_the_form_of_an_example_passes():
    require_form(GOOD, LIKE, "it")
    require_form(LIKE, LIKE, "it")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("count", "3", "it['count'] is not a number"),
        ("name", 3, "it['name'] is not a str"),
        ("norms", [1.0, None], "it['norms'][1] is not a number"),
        ("norms", {}, "it['norms'] is not a list"),
        ("inner", [], "it['inner'] is not a dictionary"),
        ("inner", {}, "it['inner'] has no 'score'"),
        ("inner", {"score": 1.0}, "it['inner']['score'] is not a Tensor"),
        ("inner", {"score": torch.ones(2)}, "it['inner']['score'] has 2 elements, not 1"),
    ],
)
def test_the_first_difference_is_named_in_one_line(name, value, problem):
    with pytest.raises(UserError) as caught:
        require_form({**GOOD, name: value}, LIKE, "it")
    assert str(caught.value) == (
        f"cannot resume: in trainer_state.ckpt {problem}: the file was altered, or another version wrote it; name "
        "another checkpoint, or start from the weights of this one with --model.model_path"
    )
