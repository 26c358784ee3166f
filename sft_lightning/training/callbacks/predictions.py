"""Write the answers of ``predict`` to predictions.jsonl."""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from sft_lightning.checkpointing.run_folder import register_file
from sft_lightning.distributed.collectives import all_gather_objects
from sft_lightning.system.files import write_atomically


class PredictionWriter(BasePredictionWriter):
    """Writes the rows that ``predict_step`` returned, in file order, one JSON object per line.

    Args:
        output_dir: Folder for ``predictions.jsonl``.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="epoch")
        self._path = Path(output_dir) / "predictions.jsonl"

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        rows: list[Any] = [row for batch in predictions for row in batch]
        # Rank r answered the prompts r, r + world_size, ...
        parts = all_gather_objects(rows, trainer.world_size)
        rows = [row for group in zip_longest(*parts) for row in group if row is not None]
        if trainer.is_global_zero:
            register_file(self._path.parent, self._path.name)
            with write_atomically(self._path) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            print(f"wrote {len(rows)} rows to {self._path}")
