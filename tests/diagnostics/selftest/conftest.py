"""Define a selftest setup of the tiny model on the 42 rows: one step of eight rows and one of two."""

import pytest

from sft_lightning import SFTDataModule, SFTModule
from sft_lightning.diagnostics.selftest.setup import SelftestSetup
from sft_lightning.models.precision import Precision


@pytest.fixture
def make_setup(model_folder, train_file, tmp_path):
    def make(data=None, model=None, **options):
        datamodule = SFTDataModule(
            **{"train_path": train_file, "tokenizer_path": model_folder, "batch_size": 4, "max_length": 512, "seed": 1}
            | (data or {})
        )
        module = SFTModule(**{"model_path": model_folder, "learning_rate": 1e-2} | (model or {}))
        defaults = {"accumulate": 2, "clipping": {"gradient_clip_val": 1.0}, "accelerator": "cpu"}
        rest = {
            "precision": Precision.named(options.pop("precision", "32-true")),
            "seed": 3,
            "num_steps": 2,
            "folder": tmp_path,
        }
        return SelftestSetup(data=datamodule, model=module, **(defaults | rest | options))

    return make
