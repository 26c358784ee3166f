import inspect

import pytest

from sft_lightning.errors import UserError
from sft_lightning.generation.base import Generation, SamplingGenerator, answer_numbers
from sft_lightning.generation.openai_server import OpenAIServerGenerator
from sft_lightning.generation.transformers_generator import TransformersGenerator

MAKERS = {
    TransformersGenerator: TransformersGenerator,
    OpenAIServerGenerator: lambda **settings: OpenAIServerGenerator("http://127.0.0.1:1/v1", **settings),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=lambda make: getattr(make, "__name__", ""))
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        (
            {"temperature": 0.0},
            "temperature 0.0 must be finite, at least 1e-6; for the most likely answer set greedy: true",
        ),
        ({"temperature": 1e-39}, "temperature 1e-39 must be finite, at least 1e-6"),
        ({"temperature": float("nan")}, "temperature nan must be finite"),
        ({"temperature": float("inf")}, "temperature inf must be finite"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p 1.1 must be above 0 and at most 1"),
        ({"stop_strings": "</answer>"}, "stop_strings '</answer>' must be a list of texts, none of them empty"),
        ({"stop_strings": ["a", ""]}, "stop_strings ['a', ''] must be a list of texts, none of them empty"),
    ],
)
def test_every_generator_refuses_bad_settings(make, settings, message):
    with pytest.raises(UserError) as raised:
        make(**settings)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("generator", "make"), MAKERS.items())
def test_every_generator_keeps_its_settings(generator, make):
    settings = {
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "greedy": True,
        "stop_strings": ["a", "b"],
        "seed": 3,
    }
    made = make(**settings)
    assert {name: getattr(made, name) for name in settings} == {**settings, "stop_strings": ("a", "b")}
    shared = inspect.signature(SamplingGenerator.__init__).parameters.keys()
    assert shared - {"self"} == settings.keys()


def test_every_generator_has_the_same_defaults():
    signatures = [inspect.signature(generator).parameters for generator in MAKERS]
    shared = inspect.signature(SamplingGenerator).parameters
    defaults = [{name: signature[name].default for name in shared} for signature in signatures]
    assert defaults[0] == defaults[1]


def test_answers_are_counted_unless_they_are_numbered():
    assert list(answer_numbers(["a", "b"], None)) == [0, 1]
    assert list(answer_numbers(["a", "b"], [5, 3])) == [5, 3]
    with pytest.raises(AssertionError):
        answer_numbers(["a", "b"], [5])


def test_equal_answers_may_differ_in_their_entropy():
    assert Generation("a", 1, "eos", 0.5) == Generation("a", 1, "eos", 0.6)
    assert Generation("a", 1, "eos") != Generation("a", 1, "length")
