"""Test that every published config parses, sets its values, and builds the objects of a run."""

import functools
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from sft_lightning import GenerationEvaluation, HFCheckpoint, SFTDataModule, SFTModule, TransformersGenerator
from sft_lightning.cli.main import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))


def bases_of(overlay):
    """Returns the configs that an overlay's comment shows it on top of."""
    command = re.findall(rf"--config (\S+) --config configs/overlays/{overlay.name}", overlay.read_text("utf-8"))
    return [ROOT / base for base in command]


def name_of(paths):
    return "+".join(path.stem for path in paths)


STACKS = [[path] for path in CONFIGS] + [[base, overlay] for overlay in OVERLAYS for base in bases_of(overlay)]
each_stack = pytest.mark.parametrize("paths", STACKS, ids=name_of)


def options(paths):
    return [word for path in paths for word in ("--config", str(path))]


def settings(tree, prefix=""):
    """Returns every leaf of nested mappings under its dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in settings(value, f"{prefix}.{key}").items()}


def merged_settings(paths):
    """Returns the settings of the files; later files override earlier ones."""
    return {name: leaf for path in paths for name, leaf in settings(yaml.safe_load(path.read_text("utf-8"))).items()}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The run folders of the configs land in a folder that goes away, and no network is asked for a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def resolve(capsys):
    """Returns all settings that a command resolves to, defaults included."""

    def resolved(paths, *more, command="fit"):
        with pytest.raises(SystemExit) as end:
            main([command, *options(paths), *more, "--print_config"])
        assert end.value.code == 0
        return settings(yaml.safe_load(capsys.readouterr().out))

    return resolved


@pytest.fixture
def build(monkeypatch):
    """Returns the Trainer, the module and the data module that `fit` would train with."""
    built = []

    @functools.wraps(Trainer.fit)  # the parser reads its options off the signature
    def fit(self, model, **kwargs):
        built.append((self, model, kwargs["datamodule"]))

    def instantiate(paths, *more):
        monkeypatch.setattr(Trainer, "fit", fit)
        assert main(["fit", *options(paths), "--trainer.accelerator", "cpu", *more]) == 0
        return built.pop()

    return instantiate


def callback(trainer, kind):
    (found,) = [each for each in trainer.callbacks if isinstance(each, kind)]
    return found


def test_there_are_configs():
    assert {"quickstart", "sft_gsm8k"} <= {path.stem for path in CONFIGS}
    assert "laptop" in {path.stem for path in OVERLAYS}
    assert set((ROOT / "configs").rglob("*.y*ml")) == {*CONFIGS, *OVERLAYS}


@each_stack
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_setting_is_known_and_arrives(resolve, paths, command):
    written = merged_settings(paths)
    resolved = resolve(paths, command=command)
    assert {name: resolved[name] for name in written} == written
    # 5e-5 without a point is a text in YAML 1.1, and would stay one wherever a text is accepted.
    assert not [value for value in written.values() if isinstance(value, str) and re.fullmatch(r"[-+.\de]+", value)]


@each_stack
def test_a_misspelled_setting_is_refused(tmp_path, capsys, paths):
    """So that the test above would see one."""
    text = paths[-1].read_text("utf-8")
    misspelt = {
        "output_dir:": "output_folder:",
        "every_n_train_steps:": "every_n_steps_of_training:",
        "data_parallel_size:": "data_size:",
    }
    there = [(right, wrong) for right, wrong in misspelt.items() if right in text]
    assert there
    for right, wrong in there:
        (tmp_path / "misspelt.yaml").write_text(text.replace(right, wrong))
        assert main(["fit", *options([*paths[:-1], tmp_path / "misspelt.yaml"]), "--print_config"]) == 2
        assert wrong.removesuffix(":") in capsys.readouterr().err


@each_stack
def test_a_config_builds_the_objects_of_a_run(build, paths):
    trainer, module, datamodule = build(paths)
    assert isinstance(module, SFTModule)
    assert isinstance(datamodule, SFTDataModule)
    merged = merged_settings(paths)
    assert trainer.accumulate_grad_batches == merged[".trainer.accumulate_grad_batches"]
    assert datamodule.tokenizer_path == merged[".model.model_path"]
    assert callback(trainer, HFCheckpoint).run == Path(merged[".output_dir"]).absolute()
    assert callback(trainer, GenerationEvaluation).num_examples == merged[".evaluation.num_examples"]


GUIDE = {  # the settings of the guide's script
    ".output_dir": "checkpoints/sft",
    ".seed_everything": 42,
    ".trainer.max_epochs": 3,
    ".data.batch_size": 4,
    ".trainer.accumulate_grad_batches": 8,
    ".model.learning_rate": 0.00005,
    ".trainer.gradient_clip_val": 1.0,
    ".checkpoint.every_n_train_steps": 500,
    ".data.max_train_examples": None,
    ".data.max_length": 2048,
    ".data.test_path": None,
    ".model.init": "pretrained",
    ".model.weight_decay": 0.0,
    ".model.betas": [0.9, 0.999],
    ".model.lr_schedule": "constant",
    ".data.tokenizer_path": None,
}


def test_the_gsm8k_config_is_the_guides(resolve):
    resolved = resolve([ROOT / "configs" / "sft_gsm8k.yaml"])
    assert {name: resolved[name] for name in GUIDE} == GUIDE


def test_the_guides_numbers_are_the_defaults_too(resolve):
    resolved = resolve([])
    # Three epochs unless max_steps is set: tests/cli/test_config.py
    assert {name: resolved[name] for name in GUIDE} == {**GUIDE, ".trainer.max_epochs": None}


def paths_of(datamodule):
    return {name: settings.path for name, settings in datamodule.sets.items()}


def test_the_gsm8k_run(build):
    trainer, module, datamodule = build([ROOT / "configs" / "sft_gsm8k.yaml"], "--trainer.precision", "32-true")
    assert (trainer.max_epochs, trainer.max_steps) == (3, -1)
    assert trainer.accumulate_grad_batches == 8
    assert trainer.gradient_clip_val == 1.0
    assert trainer.log_every_n_steps == 10
    # every 100 optimizer steps of 8 micro-batches, over the ends of epochs
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (800, None)
    assert datamodule.batch_size == 4
    assert datamodule.tokenizer_path == "Qwen/Qwen2.5-Math-1.5B"
    assert paths_of(datamodule) == {
        "train": "data/gsm8k/sft.jsonl",
        "val": "data/gsm8k/test.jsonl",
        "test": "data/gsm8k/test.jsonl",
    }
    assert (module.hparams.learning_rate, module.hparams.weight_decay) == (0.00005, 0.0)
    saving = callback(trainer, HFCheckpoint)
    assert (saving.monitor, saving.mode, saving.keep_last) == ("val/answer_accuracy", "max", None)
    evaluation = callback(trainer, GenerationEvaluation)
    assert (evaluation.num_examples, evaluation.output_dir) == (200, "checkpoints/sft")
    assert isinstance(evaluation.generator, TransformersGenerator)
    assert (evaluation.generator.max_new_tokens, evaluation.generator.temperature) == (1024, 1.0)


def test_the_quickstart_run(build):
    trainer, module, datamodule = build([ROOT / "configs" / "quickstart.yaml"])
    assert (trainer.max_epochs, trainer.accumulate_grad_batches, trainer.precision) == (6, 1, "32-true")
    assert datamodule.batch_size == 32
    assert paths_of(datamodule)["train"] == "data/quickstart/train.jsonl"
    assert paths_of(datamodule)["val"] == "data/quickstart/heldout.jsonl"
    assert module.hparams.lr_schedule == "cosine"
    assert callback(trainer, GenerationEvaluation).generator.greedy is True
    assert callback(trainer, HFCheckpoint).monitor == "val/answer_accuracy"


def test_the_laptop_run(build):
    paths = [ROOT / "configs" / "sft_gsm8k.yaml", ROOT / "configs" / "overlays" / "laptop.yaml"]
    trainer, module, datamodule = build(paths, "--model.model_path", "data/quickstart/model", "--model.init", "random")
    assert (trainer.max_steps, trainer.accumulate_grad_batches, trainer.precision) == (20, 8, "32-true")
    assert datamodule.batch_size == 4  # the base's
    assert paths_of(datamodule) == {"train": "data/gsm8k/sft.jsonl"}
    assert datamodule.tokenizer_path == "data/quickstart/model"
    assert (module.hparams.init, module.hparams.learning_rate) == ("random", 0.001)
    assert callback(trainer, HFCheckpoint).monitor is None
    assert callback(trainer, HFCheckpoint).run == Path("checkpoints/laptop").absolute()
    assert callback(trainer, GenerationEvaluation).num_examples == 0


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_short_and_names_its_base(overlay):
    lines = overlay.read_text("utf-8").splitlines()
    assert len(lines) < 15
    assert bases_of(overlay), f"{overlay.name}: show the command, with the --config that it overrides"
    assert all(base in CONFIGS for base in bases_of(overlay))


@pytest.mark.parametrize("path", [*CONFIGS, *OVERLAYS], ids=lambda path: path.stem)
def test_no_key_is_repeated(path):
    """YAML would take the last one without a word."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            assert len(keys) == len(set(keys)), keys
            return super().construct_mapping(node, deep)

    with path.open(encoding="utf-8") as file:
        assert yaml.load(file, Strict)


@pytest.mark.parametrize("prefix", ["sft_lightning.", ""])
def test_class_paths_resolve_to_the_short_form(resolve, prefix):
    """Which is what config.yaml holds."""
    resolved = resolve(
        [ROOT / "configs" / "quickstart.yaml"],
        "--evaluation.grader",
        f"{prefix}Gsm8kGrader",
        "--data.template",
        "sft_lightning.R1Zero",
        "--trainer.callbacks+=sft_lightning.StepProgress",
        "--trainer.logger",
        '{"class_path": "sft_lightning.MetricsCSVLogger", "init_args": {"directory": "logs"}}',
    )
    assert resolved[".evaluation.grader.class_path"] == "sft_lightning.Gsm8kGrader"
    assert resolved[".evaluation.generator.class_path"] == "sft_lightning.TransformersGenerator"
    assert resolved[".data.template.class_path"] == "sft_lightning.R1Zero"
    assert resolved[".trainer.logger.class_path"] == "sft_lightning.MetricsCSVLogger"
    assert [one["class_path"] for one in resolved[".trainer.callbacks"]] == ["sft_lightning.StepProgress"]
    assert not [value for value in map(str, resolved.values()) if re.search(r"sft_lightning\.[a-z_]+\.", value)]
