import math

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.errors import RunFailedError, UserError
from sft_lightning.generation.base import Generation
from sft_lightning.generation.transformers_generator import TransformersGenerator

PROMPTS = [
    "1+1=",
    "What is seven times eight? ",
    "x",
    "The number after 41 is ",
    "a b c d e f g h i j k l m",
    "\u00e9!",
]


@pytest.fixture(scope="module")
def tokenizer():
    """Each byte is a token, and so are the text 'END.more' and the special token <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    fast.add_tokens([AddedToken("END.more", normalized=False)])
    return fast


def tiny_model(tokenizer, hidden_size=32, num_layers=2):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def random_model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture
def scripted_model(tokenizer):
    """A Qwen2 whose next token depends on the last one only, by a table; '!' follows any other token."""
    size = len(tokenizer)
    model = tiny_model(tokenizer, hidden_size=size + -size % 4, num_layers=1)
    successors = dict(zip("=</answer", "</answer>", strict=True)) | {"?": "<eos>", "#": "END.more"}
    table = torch.full((size,), one_token(tokenizer, "!"))
    for token, successor in successors.items():
        table[one_token(tokenizer, token)] = tokenizer(successor)["input_ids"][0]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[table, torch.arange(size)] = 100.0
    return model


def one_token(tokenizer, text):
    (token,) = tokenizer(text)["input_ids"]
    return token


def greedy(**settings):
    return TransformersGenerator(**{"greedy": True, "max_new_tokens": 12, **settings})


# prompt, text, tokens, reason
ENDINGS = [
    ("4=", "</answer>", 9, "stop_string"),
    ("why?", "", 1, "eos"),
    ("go up", "!!!!!!!!!!!!", 12, "length"),
    ("see </answer>", "!!!!!!!!!!!!", 12, "length"),  # a stop string in the prompt does not count
    ("see </answer", ">!!!!!!!!!!!", 12, "length"),  # nor is one that the prompt began
]


@pytest.mark.parametrize(("prompt", "text", "num_tokens", "stop_reason"), ENDINGS)
def test_how_answers_end(scripted_model, tokenizer, prompt, text, num_tokens, stop_reason):
    assert greedy().generate(scripted_model, tokenizer, [prompt]) == [Generation(text, num_tokens, stop_reason)]


def test_rows_of_a_batch_end_each_for_itself(scripted_model, tokenizer):
    expected = [Generation(text, num_tokens, reason) for _, text, num_tokens, reason in ENDINGS]
    assert greedy().generate(scripted_model, tokenizer, [prompt for prompt, *_ in ENDINGS]) == expected


def test_stop_string_inside_a_token_is_where_the_text_ends(scripted_model, tokenizer):
    (generation,) = greedy(stop_strings=["END."]).generate(scripted_model, tokenizer, ["#"])
    assert generation == Generation("END.", 1, "stop_string")


def test_the_first_of_several_stop_strings_ends_the_text(scripted_model, tokenizer):
    generator = greedy(stop_strings=("</answer>", "wer", "</a"))
    assert generator.generate(scripted_model, tokenizer, ["="]) == [Generation("</a", 3, "stop_string")]


def test_without_stop_strings(scripted_model, tokenizer):
    generator = greedy(stop_strings=())
    assert generator.generate(scripted_model, tokenizer, ["="]) == [Generation("</answer>!!!", 12, "length")]


def test_special_token_as_stop_string_is_text(scripted_model, tokenizer):
    generator = greedy(stop_strings=("<eos>",))
    assert generator.generate(scripted_model, tokenizer, ["?"]) == [Generation("<eos>", 1, "stop_string")]


def test_the_models_own_eos_ends_too(scripted_model, tokenizer):
    scripted_model.generation_config.eos_token_id = [one_token(tokenizer, "w")]
    assert greedy().generate(scripted_model, tokenizer, ["=", "?"]) == [
        Generation("</ans", 6, "eos"),
        Generation("", 1, "eos"),
    ]


def answer_by_a_plain_loop(model, tokenizer, prompt, max_new_tokens, stop):
    tokens = list(tokenizer(prompt)["input_ids"])
    prompt_length = len(tokens)
    while len(tokens) < prompt_length + max_new_tokens and stop not in tokenizer.decode(tokens[prompt_length:]):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[prompt_length:])


def test_greedy_equals_a_plain_loop_for_every_batch_size(random_model, tokenizer):
    expected = [answer_by_a_plain_loop(random_model, tokenizer, prompt, 24, "U") for prompt in PROMPTS]
    assert len(set(expected)) > 1
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    for rows in (1, 4, 16):
        generator = greedy(max_new_tokens=24, stop_strings=("U",), batch_tokens=rows * (longest + 24))
        generations = generator.generate(random_model, tokenizer, PROMPTS)
        assert [generation.text for generation in generations] == expected
        assert {generation.stop_reason for generation in generations} == {"stop_string", "eos", "length"}


def test_greedy_equals_transformers_generate(random_model, tokenizer):
    generations = greedy(max_new_tokens=24, stop_strings=()).generate(random_model, tokenizer, PROMPTS)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        eos = tokenizer.eos_token_id
        output = random_model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        assert generation.text == tokenizer.decode(output[0, ids.shape[1] :].tolist()).split("<eos>")[0]


def recorded_shapes(model):
    """Returns a list of the shapes of input ids, filled with every forward pass."""
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_batches_keep_to_the_token_budget(random_model, tokenizer):
    shapes = recorded_shapes(random_model)
    prompts = ["aa", "bbbb", "c" * 30, "d", "eeeee"]
    greedy(max_new_tokens=5, batch_tokens=20).generate(random_model, tokenizer, prompts)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, 30), (2, 5), (2, 2)]


def test_batches_get_smaller_where_memory_does_not_suffice(random_model, tokenizer):
    def limited(module, args, kwargs):
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = greedy().generate(random_model, tokenizer, PROMPTS)
    hook = random_model.register_forward_pre_hook(limited, with_kwargs=True)
    shapes = recorded_shapes(random_model)
    assert greedy().generate(random_model, tokenizer, PROMPTS) == expected
    assert max(rows for rows, _ in shapes) == 3
    hook.remove()
    random_model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        greedy().generate(random_model, tokenizer, PROMPTS)


def test_sampling_repeats_with_its_seed(random_model, tokenizer):
    def texts(seed):
        generator = TransformersGenerator(max_new_tokens=16, seed=seed)
        return [generation.text for generation in generator.generate(random_model, tokenizer, PROMPTS)]

    first = texts(seed=3)
    torch.rand(5)
    assert texts(seed=3) == first
    assert texts(seed=4) != first


def test_samples_do_not_depend_on_the_batch(random_model, tokenizer):
    def texts(prompts, numbers=None, rows=16):
        generator = TransformersGenerator(max_new_tokens=24, seed=3, top_p=0.95, batch_tokens=rows * (27 + 24))
        return [each.text for each in generator.generate(random_model, tokenizer, prompts, numbers=numbers)]

    prompts = [*PROMPTS, PROMPTS[0]]
    together = texts(prompts)
    assert len(set(together)) == len(prompts)  # the same prompt twice, too
    for rows in (1, 4):
        assert texts(prompts, rows=rows) == together
    shuffled = [4, 6, 0, 5, 2, 1, 3]
    assert texts([prompts[index] for index in shuffled], shuffled) == [together[index] for index in shuffled]
    assert texts([prompts[5], prompts[2]], [5, 2]) == [together[5], together[2]]
    assert texts([prompts[5]], [4]) != [together[5]]


def test_sampling_settings_are_the_generators_and_not_the_models(random_model, tokenizer):
    settings = {"max_new_tokens": 16, "seed": 1}
    plain = TransformersGenerator(**settings).generate(random_model, tokenizer, PROMPTS)
    own = random_model.generation_config
    own.update(top_k=1, temperature=0.01, top_p=0.1, repetition_penalty=9.0, do_sample=False, max_new_tokens=2)
    before = own.to_dict()
    assert TransformersGenerator(**settings).generate(random_model, tokenizer, PROMPTS) == plain
    assert random_model.generation_config is own
    assert own.to_dict() == before


def test_tiny_top_p_and_tiny_temperature_are_greedy(random_model, tokenizer):
    expected = greedy().generate(random_model, tokenizer, PROMPTS)
    for settings in ({"top_p": 1e-6}, {"temperature": 1e-4}):
        generator = TransformersGenerator(max_new_tokens=12, **settings)
        assert generator.generate(random_model, tokenizer, PROMPTS) == expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_training_state_and_random_state_stay(random_model, tokenizer):
    random_model.train()
    random_model.model.layers[1].eval()  # a frozen part
    random_model.config.use_cache = False
    random_model.gradient_checkpointing_enable()
    modes = [module.training for module in random_model.modules()]
    state = torch.get_rng_state()
    TransformersGenerator(max_new_tokens=8).generate(random_model, tokenizer, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in random_model.modules()] == modes
    assert random_model.config.use_cache is False
    assert all(parameter.requires_grad and parameter.grad is None for parameter in random_model.parameters())


def test_state_stays_after_an_error(random_model, tokenizer):
    def fail(*_):
        torch.rand(3)
        raise ValueError("broken")

    random_model.train()
    own = random_model.generation_config
    state = torch.get_rng_state()
    random_model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        greedy().generate(random_model, tokenizer, PROMPTS)
    assert random_model.training
    assert random_model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_training_continues_after_generation_in_inference_mode(random_model, tokenizer):
    with torch.inference_mode():
        generations = greedy().generate(random_model, tokenizer, PROMPTS)
    assert generations == greedy().generate(random_model, tokenizer, PROMPTS)
    random_model.train()
    random_model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert random_model.lm_head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_model_is_kept(scripted_model, tokenizer, dtype):
    model = scripted_model.to(dtype)
    assert greedy().generate(model, tokenizer, ["4="]) == [Generation("</answer>", 9, "stop_string")]
    assert model.dtype == dtype


def test_mean_entropy_does_not_affect_equality_of_answers(random_model, tokenizer):
    assert Generation("a", 1, "eos", mean_entropy=0.5) == Generation("a", 1, "eos")
    generations = greedy().generate(random_model, tokenizer, PROMPTS)
    assert all(0 < generation.mean_entropy < 5.6 for generation in generations)  # ln 258 = 5.55


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"greedy": True}, {}, {"top_p": 0.5}])
def test_a_model_whose_logits_are_not_finite_gives_no_answer(tokenizer, value, settings):
    model = tiny_model(tokenizer)
    model.get_output_embeddings().weight.data[5] = value
    with pytest.raises(RunFailedError, match=r"^the model cannot answer: its logits are NaN"):
        TransformersGenerator(max_new_tokens=3, **settings).generate(model, tokenizer, ["4+5", "a"])


def test_no_prompts(random_model, tokenizer):
    assert greedy().generate(random_model, tokenizer, []) == []


def test_empty_prompt_is_refused(random_model, tokenizer):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        greedy().generate(random_model, tokenizer, ["a", ""])


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"batch_tokens": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop_strings": "</answer>"},
        {"stop_strings": ("a", "")},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        TransformersGenerator(**setting)


@pytest.mark.gpu
def test_on_a_gpu(random_model, tokenizer):
    model = random_model.to("cuda")
    cpu_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    generator = TransformersGenerator(max_new_tokens=16, seed=3)
    first = generator.generate(model, tokenizer, PROMPTS)
    assert torch.equal(torch.get_rng_state(), cpu_state)
    assert torch.equal(torch.cuda.get_rng_state(), cuda_state)
    torch.rand(5, device="cuda")
    assert generator.generate(model, tokenizer, PROMPTS) == first
    model.to(torch.bfloat16)
    assert len(generator.generate(model, tokenizer, PROMPTS)) == len(PROMPTS)
