import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.errors import UserError
from sft_lightning.evaluation.evaluate import EvaluationResult, evaluate
from sft_lightning.evaluation.generation import Generation, Generator, TransformersGenerator
from sft_lightning.evaluation.grading import Grade, Grader

PROMPTS = ["What is 8*9?", "What is 1/2?", "What is 2+2?", "Caf\u00e9?"]
GROUND_TRUTHS = ["72", 0.5, 4, ["a", "b"]]
WRITTEN = [
    Generation(" 8*9 </think> <answer> 72 </answer>", 12, "stop_string"),
    Generation(" half </think><answer> .50 </answer>", 11, "stop_string"),
    Generation(" two and two and two and", 20, "length"),
    Generation(" caf\u00e9\n</think> <answer> tea </answer> ok", 9, "eos"),
]


class Written(Generator):
    def generate(self, model, tokenizer, prompts):
        assert list(prompts) == PROMPTS
        return WRITTEN


def evaluate_written(**settings):
    return evaluate(None, PROMPTS, GROUND_TRUTHS, tokenizer=object(), generator=Written(), **settings)


def test_counts():
    result = evaluate_written()
    assert result.num_examples == 4
    assert result.num_format_correct == 2
    assert result.num_answer_correct == 2
    assert result.num_rewarded == 1
    assert result.num_timed_out == 0
    assert result.format_accuracy == 0.5
    assert result.answer_accuracy == 0.5
    assert result.mean_reward == 0.25
    assert result.stop_reasons == {"eos": 1, "length": 1, "stop_string": 2}
    assert result.failures == {"cut_at_limit": 1, "text_after_answer": 1, "thought_not_closed": 1}


def test_predictions_file(tmp_path):
    result = evaluate_written(output_dir=tmp_path / "new" / "folder")
    lines = (tmp_path / "new" / "folder" / "predictions.jsonl").read_bytes().decode().split("\n")
    assert lines == [
        '{"prompt": "What is 8*9?", "response": " 8*9 </think> <answer> 72 </answer>", "ground_truth": "72", '
        '"format_correct": true, "answer_correct": true, "failure": null, "timed_out": false, '
        '"stop_reason": "stop_string", "num_tokens": 12}',
        '{"prompt": "What is 1/2?", "response": " half </think><answer> .50 </answer>", "ground_truth": 0.5, '
        '"format_correct": false, "answer_correct": true, "failure": "thought_not_closed", "timed_out": false, '
        '"stop_reason": "stop_string", "num_tokens": 11}',
        '{"prompt": "What is 2+2?", "response": " two and two and two and", "ground_truth": 4, '
        '"format_correct": false, "answer_correct": false, "failure": "cut_at_limit", "timed_out": false, '
        '"stop_reason": "length", "num_tokens": 20}',
        '{"prompt": "Caf\u00e9?", "response": " caf\u00e9\\n</think> <answer> tea </answer> ok", '
        '"ground_truth": ["a", "b"], "format_correct": true, "answer_correct": false, '
        '"failure": "text_after_answer", "timed_out": false, "stop_reason": "eos", "num_tokens": 9}',
        "",
    ]
    assert [json.loads(line) for line in lines[:-1]] == result.samples


def test_metrics_file(tmp_path):
    evaluate_written(output_dir=str(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "num_examples": 4,
        "num_format_correct": 2,
        "num_answer_correct": 2,
        "num_rewarded": 1,
        "num_timed_out": 0,
        "format_accuracy": 0.5,
        "answer_accuracy": 0.5,
        "mean_reward": 0.25,
        "stop_reasons": {"eos": 1, "length": 1, "stop_string": 2},
        "failures": {"cut_at_limit": 1, "text_after_answer": 1, "thought_not_closed": 1},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_writing_again_replaces_the_earlier_evaluation(tmp_path):
    evaluate_written(output_dir=tmp_path)
    EvaluationResult(evaluate_written().samples[:1]).write(tmp_path)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["num_examples"] == 1


def test_a_lone_surrogate_is_written_as_an_escape(tmp_path):
    sample = {**evaluate_written().samples[0], "response": "\ud800"}
    EvaluationResult([sample]).write(tmp_path)
    line = (tmp_path / "predictions.jsonl").read_bytes()
    assert b'"response": "\\ud800"' in line
    assert json.loads(line) == sample


def test_parts_add_up():
    samples = evaluate_written().samples
    joined = EvaluationResult(samples[:1] + samples[1:])
    assert joined == evaluate_written()


def test_rates_of_no_examples_are_zero():
    assert EvaluationResult().metrics()["answer_accuracy"] == 0.0


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


def test_a_model_from_nowhere_needs_a_tokenizer():
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
