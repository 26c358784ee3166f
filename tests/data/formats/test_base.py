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


def test_identity_of_another_class_holds_its_module():
    assert template_identity(Loud()) == f"{__name__}.Loud/3"


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
