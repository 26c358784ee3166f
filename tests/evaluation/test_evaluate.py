import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.evaluation.evaluate import evaluate
from sft_lightning.evaluation.result import EvaluationResult, read_samples
from sft_lightning.generation.base import Generation, Generator
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.grading.graders import Grade, Grader

PROMPTS = ["What is 8*9?", "What is 1/2?", "What is 2+2?", "Caf\u00e9?"]
GROUND_TRUTHS = ["72", 0.5, 4, ["a", "b"]]
WRITTEN = [
    Generation(" 8*9 </think> <answer> 72 </answer>", 12, "stop_string", 0.5),
    Generation(" half </think><answer> .50 </answer>", 11, "stop_string", 0.25),
    Generation(" two and two and two and", 20, "length"),
    Generation(" caf\u00e9\n</think> <answer> tea </answer> ok", 9, "eos"),
]


class Written(Generator):
    def generate(self, model, tokenizer, prompts, *, numbers=None):
        assert list(prompts) == PROMPTS
        return WRITTEN


def evaluate_written(**settings):
    return evaluate(None, PROMPTS, GROUND_TRUTHS, tokenizer=object(), generator=Written(), **settings)


def test_prompts_are_answered_and_graded():
    samples = evaluate_written().samples
    assert [sample["prompt"] for sample in samples] == PROMPTS
    assert [sample["ground_truth"] for sample in samples] == GROUND_TRUTHS
    assert [(one["format_correct"], one["answer_correct"]) for one in samples] == [
        (True, True),
        (False, True),
        (False, False),
        (True, False),
    ]
    assert [one["failure"] for one in samples] == [None, "thought_not_closed", "cut_at_limit", "text_after_answer"]
    for name in ("num_tokens", "stop_reason", "mean_entropy"):
        assert [sample[name] for sample in samples] == [getattr(generation, name) for generation in WRITTEN]


class Numbered(Generator):
    """Answers with the prompt and the number that it was given."""

    def generate(self, model, tokenizer, prompts, *, numbers=None):
        return [Generation(f"{prompt} {number}", 1, "eos") for prompt, number in zip(prompts, numbers, strict=True)]


def test_answer_numbers_do_not_depend_on_the_part():
    def answers(prompts, **settings):
        result = evaluate(None, prompts, [1] * len(prompts), tokenizer=object(), generator=Numbered(), **settings)
        return [(one["index"], one["sample"], one["response"]) for one in result.samples]

    assert answers(["a", "b"]) == [(0, 0, "a 0"), (1, 0, "b 1")]
    assert answers(["b"], indices=[1]) == [(1, 0, "b 1")]
    second = 2**32
    assert answers(["b", "d"], indices=[1, 3], num_samples=2) == [
        (1, 0, "b 1"),
        (1, 1, f"b {second + 1}"),
        (3, 0, "d 3"),
        (3, 1, f"d {second + 3}"),
    ]


def test_results_are_written(tmp_path):
    evaluate_written(output_dir=tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
    ]
    assert EvaluationResult(read_samples(tmp_path / "new" / "folder")) == evaluate_written()


def test_any_grader():
    class Always(Grader):
        def grade(self, response, ground_truth):
            return Grade(format_correct=True, answer_correct=False, failure="timed_out", timed_out=True)

    result = evaluate_written(grader=Always())
    assert result.num_timed_out == 4
    assert result.failures == {"timed_out": 4}


def test_unequal_numbers_are_refused():
    with pytest.raises(UserError, match="1 prompts and 2 ground_truths"):
        evaluate(None, ["a"], ["1", "2"], tokenizer=object(), generator=Written())


def test_missing_ground_truth_is_refused_before_generation():
    with pytest.raises(UserError, match="prompt 1 has no ground_truth"):
        evaluate(None, ["a", "b"], ["1", None], tokenizer=object())


def test_a_model_without_a_path_needs_a_tokenizer():
    config = Qwen2Config(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(UserError, match="tokenizer="):
        evaluate(Qwen2ForCausalLM(config), ["a"], ["1"])


def test_model_folder_with_its_tokenizer(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model")
    generator = TransformersGenerator(max_new_tokens=3, stop_strings=())
    result = evaluate(model, ["1+1=", "2+2="], ["2", "4"], generator=generator, output_dir=tmp_path / "out")
    assert [sample["prompt"] for sample in result.samples] == ["1+1=", "2+2="]
    assert [sample["stop_reason"] for sample in result.samples] == ["length", "length"]
    assert [sample["num_tokens"] for sample in result.samples] == [3, 3]
    assert result.failures == {"cut_at_limit": 2}
    assert (tmp_path / "out" / "metrics.json").is_file()
