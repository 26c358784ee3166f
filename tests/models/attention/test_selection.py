"""Which attention a model gets, and that each registered one does what it is registered for."""

import copy
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig

from sft_lightning.data.batch import Segment, Segments
from sft_lightning.errors import UserError
from sft_lightning.models.attention.segments import attend
from sft_lightning.models.attention.selection import choose_attention, needs_half_precision

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = LlamaConfig(**SHAPE)
SOFT_CAPPED = Gemma2Config(**SHAPE, head_dim=8, attn_logit_softcapping=5.0, sliding_window=6)
TREE = [Segment(0, 6, -1), Segment(6, 10, 0), Segment(10, 15, 0)]
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch would describe it; packages are installed by adding their module's name."""
    gpu = SimpleNamespace(packages=set(), capability=(9, 0))
    found = "importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name, package=None: name if name in gpu.packages else None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu.capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    return gpu


def choose(choice, device_type="cuda", half_precision=True, config=LLAMA):
    return choose_attention(config, choice, device_type=device_type, half_precision=half_precision)


def message_of(*args, **kwargs):
    with pytest.raises(UserError) as raised:
        choose(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("choice", "command"),
    [
        ("flash_attention_2", "flash-attn is not installed: pip install 'sft-lightning[flash-attn]' --no-build"),
        ("flash_attention_3", "flash-attn-3 is not installed: pip install 'git+https://github.com/Dao-AILab/"),
    ],
)
def test_a_missing_package_names_the_install_command(gpu, choice, command, device_type):
    message = message_of(choice, device_type)
    assert message.startswith(f"model.attn_implementation '{choice}' cannot run here: ")
    assert f"the package {command}" in message


@pytest.mark.parametrize("choice", ["flash_attention_2", "flash_attention_3", "varlen"])
def test_a_kernel_that_cannot_run_here_is_refused(gpu, choice):
    gpu.packages = set(PACKAGES.values())
    assert "it needs a CUDA device" in message_of(choice, "cpu")
    gpu.packages = set()
    if choice in PACKAGES:
        # Installing it would not help here, and nobody should find that out afterwards.
        assert "it needs 16-bit precision such as trainer.precision bf16-mixed, and the package" in message_of(
            choice, half_precision=False
        )
    gpu.packages = set(PACKAGES.values())
    assert "it needs 16-bit precision" in message_of(choice, half_precision=False)
    wide = LlamaConfig(**{**SHAPE, "head_dim": 512})
    assert "heads have 512 dimensions" in message_of(choice, config=wide)
    gpu.capability = (7, 5)
    assert "it does not run on a GPU" in message_of(choice)


def test_what_a_kernel_does_not_have_is_refused_by_name(gpu):
    gpu.packages = set(PACKAGES.values())
    assert "it has no soft-capping" in message_of("varlen", config=SOFT_CAPPED)
    dropping = LlamaConfig(**SHAPE, attention_dropout=0.1)
    assert "it has no dropout" in message_of("varlen", config=dropping)
    assert "it has no dropout" in message_of("flash_attention_3", config=dropping)
    assert choose("flash_attention_2", config=dropping) == "sft_fa2"
    assert choose("flash_attention_2", config=SOFT_CAPPED) == "sft_fa2_eager"


@pytest.mark.parametrize(
    ("packages", "capability", "half_precision", "taken", "name", "reason"),
    [
        ({"flash_attn", "flash_attn_interface"}, (9, 0), True, "flash_attention_3", "sft_fa3", "the best that runs"),
        ({"flash_attn", "flash_attn_interface"}, (10, 0), True, "flash_attention_2", "sft_fa2", "the best that runs"),
        ({"flash_attn", "flash_attn_interface"}, (8, 0), True, "flash_attention_2", "sft_fa2", "the best that runs"),
        (set(), (8, 0), True, "varlen", "sft_varlen", "the best that runs here"),
        (
            set(),
            (7, 5),
            True,
            "sdpa",
            "sft_segments",
            "no FlashAttention: it does not run on a GPU, and the package flash-attn",
        ),
        ({"flash_attn"}, (9, 0), False, "sdpa", "sft_segments", "no FlashAttention: it needs 16-bit precision"),
    ],
)
def test_auto_takes_the_best_and_says_why(gpu, caplog, packages, capability, half_precision, taken, name, reason):
    gpu.packages, gpu.capability = packages, capability
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto", half_precision=half_precision) == name
    (message,) = caplog.messages
    assert message.startswith(f"attention: {taken} ({reason}")


def test_auto_without_a_gpu(caplog):
    caplog.set_level(logging.INFO, "sft_lightning.models.attention.selection")
    assert choose("auto", "cpu") == "sft_segments"
    assert caplog.messages == ["attention: sdpa (no FlashAttention: no CUDA device)"]


def test_a_model_without_sdpa_falls_back_on_its_eager_attention():
    assert choose("auto", "cpu", config=SOFT_CAPPED) == "sft_segments_eager"
    assert choose("eager", "cpu") == "sft_segments_eager"
    assert "'sdpa' is not supported by this model" in message_of("sdpa", "cpu", config=SOFT_CAPPED)


def test_a_model_that_looks_its_attention_up_nowhere_keeps_its_own():
    assert choose("auto", "cpu", config=MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)) == "eager"


def make_model(config, attention):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "registered", "own"),
    [(LLAMA, "sft_segments", "sdpa"), (LLAMA, "sft_fa2", "sdpa"), (SOFT_CAPPED, "sft_segments_eager", "eager")],
)
def test_without_segments_it_is_transformers_own_attention(config, registered, own):
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    outputs = []
    for attention in (registered, own):
        model = make_model(config, attention).eval()
        logits = model(input_ids=ids, attention_mask=mask).logits
        answers = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
        outputs.append((logits, answers))
        assert "sft_" not in model.config.to_json_string(use_diff=False)
    (logits, answers), (own_logits, own_answers) = outputs
    assert torch.equal(logits, own_logits)
    assert torch.equal(answers, own_answers)


def test_which_attention_needs_half_precision():
    assert needs_half_precision(make_model(LLAMA, "sft_fa2"))
    assert needs_half_precision(make_model(SOFT_CAPPED, "sft_varlen_eager"))
    assert not needs_half_precision(make_model(LLAMA, "sft_segments"))
    assert not needs_half_precision(make_model(LLAMA, "sdpa"))


def forward(config, attention):
    model = make_model(config, attention)
    positions = torch.tensor([[*range(6), *range(6, 10), *range(6, 11)]])
    mask, segments = torch.zeros(1, 1, 1, 1), Segments.from_tree(TREE)
    ids = torch.arange(15)[None]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, segments=segments, use_cache=False).logits


def as_a_kernel_would(query, key, value, query_offsets, key_offsets, max_queries, max_keys, **options):
    """What the varlen kernels of FlashAttention compute, from the same arguments: bottom-right causal, [T, H, E]."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    scale = options.get("softmax_scale", options.get("scale"))
    left, right = options["window_size"]
    assert right == 0
    assert options.get("causal", True)
    outputs = []
    for segment in range(len(query_offsets) - 1):
        rows = slice(*query_offsets[segment : segment + 2].tolist())
        columns = slice(*key_offsets[segment : segment + 2].tolist())
        q, k, v = query[rows].transpose(0, 1), key[columns].transpose(0, 1), value[columns].transpose(0, 1)
        assert q.shape[1] <= max_queries
        assert k.shape[1] <= max_keys
        k, v = (heads.repeat_interleave(q.shape[0] // k.shape[0], 0) for heads in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        distance = torch.arange(k.shape[1]) - torch.arange(k.shape[1])[-q.shape[1] :, None]
        hidden = (distance > 0) | ((distance < -left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("module_name", "function", "kernel"),
    [
        ("flash_attn", "flash_attn_varlen_func", "fa2"),
        ("flash_attn_interface", "flash_attn_varlen_func", "fa3"),
        ("torch.nn.attention.varlen", "varlen_attn", "varlen"),
    ],
)
@pytest.mark.parametrize("config", [LLAMA, SOFT_CAPPED], ids=["plain", "soft-capped, windowed"])
def test_kernels_are_called_for_what_the_segment_loop_computes(monkeypatch, module_name, function, kernel, config):
    """The kernels themselves run on GPUs only; their arguments are interpreted here by their documented meaning."""
    if kernel == "varlen" and config is SOFT_CAPPED:
        pytest.skip("torch's varlen attention has no soft-capping; choose_attention refuses it")
    module = ModuleType(module_name)
    setattr(module, function, as_a_kernel_would)
    monkeypatch.setitem(sys.modules, module_name, module)
    suffix = "" if config is LLAMA else "_eager"
    expected = forward(config, f"sft_segments{suffix}")
    torch.testing.assert_close(forward(config, f"sft_{kernel}{suffix}"), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "text"), [("s_aux", "attention sinks"), ("position_bias", "a position bias")])
def test_what_packed_rows_do_not_have_is_refused_by_name(name, text):
    from transformers import AttentionInterface

    function = AttentionInterface()["sft_segments"]
    heads = torch.zeros(1, 2, 15, 4)
    with pytest.raises(NotImplementedError, match=f"packed rows have no {text}"):
        function(
            torch.nn.Module(), heads, heads, heads, None, segments=Segments.from_tree(TREE), **{name: torch.ones(2)}
        )


@pytest.mark.parametrize(
    ("kernel", "name", "text"),
    [("varlen", "softcap", "soft-capping"), ("varlen", "dropout", "dropout"), ("fa3", "dropout", "dropout")],
)
def test_what_a_kernel_does_not_have_is_refused_in_the_call_too(kernel, name, text):
    """Where a model's config has it under a name that choose_attention does not know."""
    from transformers import AttentionInterface

    heads = torch.zeros(1, 2, 15, 4)
    with pytest.raises(NotImplementedError, match=f"packed rows have no {text}"):
        AttentionInterface()[f"sft_{kernel}"](
            torch.nn.Module(), heads, heads, heads, None, segments=Segments.from_tree(TREE), **{name: 0.5}
        )


def test_a_varlen_attention_without_grouped_heads_is_too_old(gpu, monkeypatch):
    def as_it_came(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError("called")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_it_came)
    assert "takes no grouped heads" in message_of("varlen")
    assert choose("auto") == "sft_segments"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fa3", "fa2", "varlen"])
@pytest.mark.parametrize("window_tokens", [None, 40])
def test_kernels_equal_the_segment_loop_on_a_gpu(kernel, window_tokens):
    from transformers import AttentionInterface

    package = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}.get(kernel)
    if package:
        pytest.importorskip(package)
    tree = [Segment(0, 64, -1), Segment(64, 130, 0), Segment(130, 200, 0), Segment(200, 333, -1)]
    segments = Segments.from_tree(tree).to(torch.device("cuda"))
    torch.manual_seed(0)
    shapes = [(8, 64), (2, 64), (2, 64)]
    tensors = [torch.randn(1, h, 333, e, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, e in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    module = torch.nn.Module()
    got, _ = AttentionInterface()[f"sft_{kernel}"](
        module, *tensors, None, segments=segments, scaling=0.125, sliding_window=window_tokens
    )
    expected = attend(*exact, segments, scale=0.125, window_tokens=window_tokens).transpose(1, 2)
    results = [got, *torch.autograd.grad(got.float().square().sum(), tensors)]
    references = [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for mine, reference in zip(results, references, strict=True):
        # bfloat16 has 8 bits of precision; probabilities and outputs are rounded to it.
        assert (mine.double() - reference).norm() <= 2e-2 * reference.norm()
