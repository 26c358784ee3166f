import re

from sft_lightning.data.formats.base import Template, template_identity
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.formats.r1_zero import R1Zero


class Loud(Plain):
    version = 3

    def render(self, row):
        return {name: text.upper() for name, text in super().render(row).items()}


class Prefixed(Template):
    required_keys = ("text",)

    def __init__(self, prefix):
        self.prefix = prefix

    @property
    def identity(self):
        return self.prefix

    def render(self, row):
        return {"prompt": self.prefix, "response": row["text"]}


def test_identity_of_built_in_templates_is_name_and_version():
    assert template_identity(Plain()) == "sft_lightning.Plain/1"
    # The digest is of the built-in prompt.
    assert template_identity(R1Zero()) == "sft_lightning.R1Zero/1:845d5beaa32da872"


def test_identity_of_another_class_holds_its_module_and_source():
    assert re.fullmatch(rf"{__name__}\.Loud/3:[0-9a-f]{{16}}", template_identity(Loud()))


class Translated(Template):
    """Knows its language by an attribute alone."""

    required_keys = ("text",)

    def __init__(self, language):
        self._language = language

    def render(self, row):
        return {"prompt": self._language, "response": row["text"]}


class LoudR1Zero(R1Zero):
    def __init__(self, mark):
        super().__init__()
        self.mark = mark


def test_arguments_are_seen_without_an_identity():
    for class_ in (Translated, LoudR1Zero):
        assert template_identity(class_("en")) == template_identity(class_("en"))
        assert template_identity(class_("en")) != template_identity(class_("fr"))


def test_identity_differs_between_instances_that_render_differently():
    one, two = template_identity(Prefixed("a")), template_identity(Prefixed("b"))
    assert one != two
    assert one == template_identity(Prefixed("a"))
    assert one.startswith(f"{__name__}.Prefixed/1:")


# The token cache's key holds these versions: whoever changes what a template renders raises its version here and there.


def test_plain_version_1_renders_this():
    assert Plain.version == 1
    row = {"prompt": " p ", "response": "r\n", "ground_truth": "1", "weight": 2, "other": "x"}
    assert Plain().render(row) == {"prompt": " p ", "response": "r\n", "ground_truth": "1", "weight": 2}


def test_r1_zero_version_1_renders_this(tmp_path):
    assert R1Zero.version == 1
    path = tmp_path / "prompt.txt"
    path.write_text("<{question}>")
    row = {"question": "q {x} ", "answer": " 1+1 = <<1+1=2>>2 # \n #### 1,002 ", "weight": 2}
    assert R1Zero(str(path)).render(row) == {
        "prompt": "<q {x} >",
        "response": " 1+1 = 2 # </think> <answer> 1002 </answer>",
        "ground_truth": "1002",
        "weight": 2,
    }
