"""Compare compiled with uncompiled layers in whole runs."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from sft_lightning import SFTModule
from sft_lightning.data.batch import Example
from sft_lightning.data.batching.collate import collate, empty_micro_batch
from sft_lightning.errors import UserError
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.losses.model_hooks import label_losses
from sft_lightning.models.compilation import compile_layers, try_compiled
from sft_lightning.models.loading import load_model

LAYOUTS = ["padded", "shared_prefix"]


@pytest.fixture(autouse=True)
def _nothing_compiled_yet(monkeypatch, tmp_path):
    """Each test compiles for itself: torch keeps graphs in the process and compiled code on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(layout, num_rows, rng):
    if num_rows == 0:
        return empty_micro_batch(0, 0)
    common = rng.integers(0, 300, 40)
    own = [rng.integers(0, 300, length) for length in rng.integers(5, 60, num_rows)]
    examples = [Example.from_prompt(np.concatenate([common, tokens]).astype(np.int32), 42) for tokens in own]
    return collate(examples, np.full(num_rows, 0.1), layout=layout, pad_token_id=0)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = label_losses(model, batch).weighted_sum
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_compile_once_for_all_sizes_and_layers(model_folder, layout):
    model, plain = load_model(model_folder), load_model(model_folder)
    compile_layers(model, backend="aot_eager")
    rng = np.random.default_rng(0)
    loss_and_gradients(model, batch_of(layout, 4, rng))
    made = num_graphs()
    assert 0 < made <= 6
    for num_rows in [4, 3, 2, 4, 5, 7, 6, 2, 3, 5] * 2:
        batch = batch_of(layout, num_rows, rng)
        loss, gradients = loss_and_gradients(model, batch)
        expected, expected_gradients = loss_and_gradients(plain, batch)
        # The same operations in float32, some of them in another order.
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    assert num_graphs() == made
    # Sizes of 1 have separate graphs: one padded row, and the single token of a micro-batch without rows.
    for num_rows in (1, 0, 1, 0, 4):
        loss_and_gradients(model, batch_of(layout, num_rows, rng))
    assert num_graphs() <= 3 * made


def test_validation_compiles_once_and_generation_never(model_folder, tokenizer):
    model = load_model(model_folder)
    compile_layers(model, backend="aot_eager")
    rng = np.random.default_rng(0)
    loss_and_gradients(model, batch_of("padded", 3, rng))
    in_training = num_graphs()
    model.eval()
    for num_rows in (3, 2, 4):
        with torch.no_grad():
            label_losses(model, batch_of("padded", num_rows, rng))
    assert num_graphs() == 2 * in_training
    generator = TransformersGenerator(max_new_tokens=12, greedy=True)
    answers = generator.generate(model, tokenizer, ["User: What is 2+2?", "Count to 3:"])
    assert num_graphs() == 2 * in_training
    assert answers == generator.generate(load_model(model_folder), tokenizer, ["User: What is 2+2?", "Count to 3:"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trial_compiles_everything_and_changes_nothing(dropout_model_folder, layout):
    model = load_model(dropout_model_folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    compile_layers(model, backend="aot_eager")
    parameter = next(model.parameters())
    parameter.register_post_accumulate_grad_hook(lambda _: pytest.fail("a step may be taken here"))
    parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():  # as where validation asks for the layout first
        try_compiled(model, layout, precision=nullcontext)
    assert torch.equal(torch.rand(1), expected)
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert parameter.grad.unique().tolist() == [1.0]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    made = num_graphs()
    assert made > 0
    parameter.requires_grad_(False).requires_grad_(True)
    parameter._post_accumulate_grad_hooks.clear()
    loss_and_gradients(model, batch_of(layout, 4, np.random.default_rng(0)))
    assert num_graphs() == made


def test_a_missing_compiler_is_named_before_training(fit, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    without_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    expected = pytest.raises(UserError, match=r"model\.compile does not work here .*C\+\+ compiler")
    with without_compiler, expected as raised:
        fit(model={"compile": True})
    assert "\n" not in str(raised.value)


def test_recomputed_activations_are_refused(fit):
    with pytest.raises(UserError, match=r"model\.compile cannot be combined with model\.gradient_checkpointing"):
        fit(model={"compile": True, "gradient_checkpointing": True})


def test_compile_is_off_by_default(fit, monkeypatch):
    monkeypatch.setattr("torch.nn.Module.compile", lambda *args, **kwargs: pytest.fail("compiled"))
    assert SFTModule("anywhere").hparams["compile"] is False
    assert len(fit(max_steps=1).losses) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 2e-2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_run_follows_the_uncompiled_one(fit, tmp_path, model_folder, val_file, layout, precision, tolerance):
    options = {"data": {"layout": layout, "val_path": val_file}, "max_epochs": 1, "precision": precision}
    model = {"learning_rate": 1e-3}
    plain = fit(tmp_path / "plain", model=model, **options)
    compiled = fit(tmp_path / "compiled", model={**model, "compile": True}, **options)
    assert num_graphs() > 0
    assert len(compiled.losses) == 6
    assert compiled.losses == pytest.approx(plain.losses, rel=tolerance)
    metrics = [float(run.trainer.callback_metrics["val/loss"]) for run in (plain, compiled)]
    assert metrics[0] == pytest.approx(metrics[1], rel=tolerance)
    names = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")}
    assert names == {path.relative_to(tmp_path / "compiled") for path in (tmp_path / "compiled").rglob("*")}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "compiled" / "final").state_dict()
    assert exported.keys() == plain.weights.keys() == compiled.weights.keys()
    assert all(torch.equal(weight, compiled.weights[name]) for name, weight in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_run_resumes_bit_equal_and_also_uncompiled(fit, tmp_path, dropout_model_folder, layout, monkeypatch):
    model, data = {"model_path": dropout_model_folder, "compile": True}, {"layout": layout}
    straight = fit(tmp_path / "run", model=model, data=data, checkpoint={"every_n_train_steps": 1}, max_steps=8)
    for step in (3, 6):
        # As in another process on another day: graphs and code of the first run are not at hand.
        torch._dynamo.reset()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"inductor-{step}"))
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        resumed = fit(tmp_path / str(step), model=model, data=data, ckpt_path=checkpoint, max_steps=8)
        assert resumed.losses == straight.losses[step:]
        assert all(torch.equal(resumed.weights[name], weight) for name, weight in straight.weights.items())
    uncompiled = fit(
        tmp_path / "uncompiled",
        model={"model_path": dropout_model_folder},
        data=data,
        ckpt_path=checkpoint,
        max_steps=8,
    )
    assert len(uncompiled.losses) == 2
    assert np.isfinite(uncompiled.losses).all()
