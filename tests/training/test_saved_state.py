"""Test that a forged trainer_state.ckpt is refused in one line, or resumes: it never crashes."""

import copy
import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from sft_lightning.errors import UserError
from sft_lightning.generation.transformers_generator import TransformersGenerator
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation

GONE = object()


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("forged")


@pytest.fixture
def resume(fit, module_folder, val_file, monkeypatch):
    """Resumes from a copy of the first of two checkpoints, of which one value is another; returns the trainer."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def train(run, **options):
        shutil.rmtree(run, ignore_errors=True)
        answers = GenerationEvaluation(
            generator=TransformersGenerator(max_new_tokens=1), num_examples=1, output_dir=str(run)
        )
        return fit(
            run,
            data={"val_path": val_file, "max_train_examples": 16},
            checkpoint={"every_n_train_steps": 1, "monitor": "val/loss"},
            callbacks=(EarlyStopping("val/loss"), answers),
            max_steps=2,
            limit_val_batches=1,
            **options,
        ).trainer

    if not (module_folder / "run").is_dir():
        train(module_folder / "run")

    def resume(*changes):
        forged = module_folder / "checkpoint-1"
        shutil.rmtree(forged, ignore_errors=True)
        shutil.copytree(module_folder / "run" / "checkpoint-1", forged)
        state = torch.load(forged / "trainer_state.ckpt", weights_only=True)
        for place, value in changes:
            put(state, place, value)
        torch.save(state, forged / "trainer_state.ckpt")
        content = (forged / "trainer_state.ckpt").read_bytes()
        manifest = json.loads((forged / "manifest.json").read_text())
        described = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"]["trainer_state.ckpt"] = described
        (forged / "manifest.json").write_text(json.dumps(manifest))
        return train(module_folder / "resumed", ckpt_path=str(forged))

    resume.state = torch.load(module_folder / "run" / "checkpoint-1" / "trainer_state.ckpt", weights_only=True)
    return resume


def put(state, place, value):
    for key in place[:-1]:
        if isinstance(state[key], tuple):
            state[key] = list(state[key])
        state = state[key]
    if value is GONE:
        del state[place[-1]]
    else:
        state[place[-1]] = copy.deepcopy(value)


FORGED = [
    (("optimizer_states", 0, "state", 3, "exp_avg_sq"), torch.zeros(3), "has the shape (3,), not (32, 32)"),
    (("optimizer_states", 0, "state", 3, "exp_avg"), torch.zeros(1).expand(32, 32), "does not lie in memory"),
    (("optimizer_states", 0, "state", 3, "exp_avg"), GONE, "has no 'exp_avg'"),
    (("optimizer_states", 0, "param_groups", 0, "params"), [0], "groups other parameters"),
    (("optimizer_states",), [], "optimizer_states holds 0 states, not 1"),
    (("optimizer_states",), GONE, "the content has no 'optimizer_states'"),
    (("lr_schedulers", 0, "last_epoch"), -1, "lr_schedulers[0]['last_epoch'] is not a count"),
    (("loops", "fit_loop", "epoch_progress", "current"), GONE, "loops['fit_loop']['epoch_progress'] has no 'current'"),
    (("loops", "fit_loop", "state_dict", "combined_loader"), 5, "['combined_loader'] is not a list"),
    (
        ("callbacks", "GenerationEvaluation", "latest"),
        {},
        "GenerationEvaluation.latest has no 'step'",
    ),
    (("SFTDataModule",), GONE, "the content has no 'SFTDataModule'"),
    (("steps",), {"num_skipped": 0, "grad_norms": [None]}, "['steps']['grad_norms'][0] is not a number"),
    (("trajectory", "model.optimizer"), ["AdamW"], "trajectory.model.optimizer is not a str"),
    (("global_step",), 1.5, "global_step is not a count"),
    (("pytorch-lightning_version",), "1.0.0", "pytorch-lightning_version is not a version of Lightning 2"),
]


@pytest.mark.parametrize(("place", "value", "problem"), FORGED)
def test_a_forged_state_is_refused_before_it_is_loaded(resume, module_folder, note_fault, place, value, problem):
    with pytest.raises(UserError) as caught:
        resume((place, value))
    message = str(caught.value)
    assert message.startswith("cannot resume: in trainer_state.ckpt ")
    assert problem in message
    assert "\n" not in message
    assert not (module_folder / "resumed" / "checkpoint-2").exists()
    note_fault(
        "checkpoint whose trainer_state.ckpt does not fit",
        provoked="moments of another shape, dtype or place in memory, keys missing, values of other types; its "
        "digest in the manifest",
        outcome="refused in one line before anything is loaded (exit 2); a slow test changes each value at random",
        tries=len(FORGED),
    )


def test_counters_that_follow_from_the_step_are_not_believed(resume):
    progress = ("loops", "fit_loop", "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
    schedule = {"optimizer": 5, "step": 5, "last_epoch": 1, "lr_lambdas": [5]}
    trainer = resume(((*progress, "completed"), 77), (("lr_schedulers", 0), schedule))
    assert trainer.global_step == 2
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


def places(value, place=()):
    if place:
        yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            if place != ("optimizer_states", 0, "state") or key < 2:
                yield from places(inner, (*place, key))
    elif isinstance(value, list | tuple) and value:
        yield from places(value[0], (*place, 0))


WRONG = [GONE, "text", None, [], {}, -1, 1.5, 2**70, torch.zeros(3), torch.tensor([[1]]), [1, "a"], {"a": 1}]


@pytest.mark.slow
def test_any_changed_value_is_refused_or_does_no_harm(resume):
    every = [(place, value) for place in places(resume.state) for value in WRONG]
    assert len(every) > 2000
    refusals, crashes = [], []
    for place, value in random.Random(0).sample(every, 200):
        try:
            trainer = resume((place, value))
        except UserError as error:
            refusals.append(str(error))
        except Exception as error:
            crashes.append((place, value, repr(error)))
        else:
            assert trainer.global_step == 2, (place, value)
    assert crashes == []
    assert not any("\n" in line for line in refusals)
    assert 50 < len(refusals) < 190
