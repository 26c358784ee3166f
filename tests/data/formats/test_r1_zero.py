import pytest

from sft_lightning.data.formats.r1_zero import R1_ZERO_PROMPT, R1Zero
from sft_lightning.errors import UserError


def test_r1_zero_renders_a_gsm8k_row():
    row = {
        "question": "She has 1,000 clips and buys 48/2. How many?",
        "answer": "48/2 = <<48/2=24>>24 clips.\n1,000+24 = <<1000+24=1024>>1,024 clips.\n#### 1,024",
    }
    rendered = R1Zero().render(row)
    assert rendered["prompt"].endswith("\nUser: She has 1,000 clips and buys 48/2. How many?\nAssistant: <think>")
    # Commas leave the number, not the thought.
    assert rendered["response"] == (" 48/2 = 24 clips.\n1,000+24 = 1,024 clips. </think> <answer> 1024 </answer>")
    assert rendered["ground_truth"] == "1024"
    assert "weight" not in rendered


def test_r1_zero_prompt_ends_inside_the_thought():
    assert R1_ZERO_PROMPT.endswith("Assistant: <think>")
    assert R1_ZERO_PROMPT.count("{question}") == 1


def test_r1_zero_keeps_a_weight():
    assert R1Zero().render({"question": "q", "answer": "s\n#### 1", "weight": 2})["weight"] == 2


@pytest.mark.parametrize("question", ["{x} {0} {}", "What is {question}?", r"\1 \g<0> {{y}}"])
def test_braces_in_a_question_are_literal(question):
    assert R1Zero().render_prompt(question) == R1_ZERO_PROMPT.split("{question}")[0] + question + "\nAssistant: <think>"


@pytest.mark.parametrize("answer", ["just text", "thought\n####", "thought\n####  \n", "#### 5", " \n#### 5"])
def test_an_answer_without_a_number_is_refused(answer):
    with pytest.raises(ValueError, match="field 'answer' must be a worked solution that ends with '#### <number>'"):
        R1Zero().render({"question": "q", "answer": answer})


def test_the_last_mark_separates_the_number():
    row = {"question": "q", "answer": "step #### one\n#### -7.5"}
    assert R1Zero().render(row)["response"] == " step #### one </think> <answer> -7.5 </answer>"


def test_a_template_file_replaces_the_prompt_and_the_identity(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Q: {question} {not_a_field}\nA: <think>", encoding="utf-8")
    own = R1Zero(template_path=str(file))
    assert own.render_prompt("1+1?") == "Q: 1+1? {not_a_field}\nA: <think>"
    assert own.identity != R1Zero().identity
    assert R1Zero().identity == R1Zero().identity


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"no place for it", "has no '{question}' in it"), (b"\xff{question}", "is not UTF-8")],
)
def test_an_unusable_template_file_is_named(tmp_path, content, message):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        R1Zero(template_path=str(file))
    assert f"template_path '{file}'" in str(error.value)
    assert message in str(error.value)
