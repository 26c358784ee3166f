from sft_lightning.data.formats.prompt_response import Plain


def test_plain_keeps_text_and_optional_fields():
    row = {"prompt": " 2+2=", "response": "4\n", "ground_truth": "4", "weight": 0.5, "id": 7}
    assert Plain().render(row) == {"prompt": " 2+2=", "response": "4\n", "ground_truth": "4", "weight": 0.5}


def test_plain_drops_optional_fields_that_are_null():
    row = {"prompt": "a", "response": "b", "ground_truth": None, "weight": None}
    assert Plain().render(row) == {"prompt": "a", "response": "b"}
