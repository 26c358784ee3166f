"""Load planned micro-batches from the token store, from any point of an epoch on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from sft_lightning.data.batch import Layout, MicroBatch
from sft_lightning.data.batching.collate import collate
from sft_lightning.data.batching.plan import EpochPlan, PlannedMicroBatch
from sft_lightning.data.batching.workers import WatchedWorkers, ignore_signals
from sft_lightning.data.token_store import TokenStore


class MicroBatches(Dataset):
    """The micro-batches of one replica, collated on access. Picklable, for use in worker processes.

    Args:
        store: The tokenized examples.
        planned: The rows and weights of each micro-batch.
        length: The number of micro-batches.
        pad_token_id: Token id of padding.
        pad_to_multiple_of: Row lengths are rounded up to a multiple of it.
        layout: Layout of the rows in a micro-batch.
    """

    def __init__(
        self,
        store: TokenStore,
        planned: Callable[[int], PlannedMicroBatch],
        length: int,
        *,
        pad_token_id: int,
        pad_to_multiple_of: int | None,
        layout: Layout = "padded",
    ) -> None:
        self._store = store
        self._planned = planned
        self._length = length
        self._collate = partial(
            collate, layout=layout, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> MicroBatch:
        planned = self._planned(index)
        examples = [self._store[int(example)] for example in planned.examples]
        return self._collate(examples, planned.label_weights, rng_seed=planned.rng_seed)


class TrainingShare:
    """One replica's planned micro-batches of an epoch, by index."""

    def __init__(self, plan: EpochPlan, replica: int) -> None:
        self._plan = plan
        self._replica = replica

    def __call__(self, index: int) -> PlannedMicroBatch:
        return self._plan.micro_batch(self._replica, index)


class ValidationShare:
    """The batches of one replica in a validation set. Every label weighs 1, so that sums are sums over tokens."""

    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self._batches = batches

    def __call__(self, index: int) -> PlannedMicroBatch:
        examples = self._batches[index]
        return PlannedMicroBatch(examples=examples, label_weights=np.ones(len(examples)), rng_seed=0)


class PlannedLoader:
    """Iterates over micro-batches, each time from the position that ``open_epoch`` returns.

    Deliberately not a DataLoader: Lightning would inject a sampler, which repeats rows under several devices, and
    restore its position on resume, which it gets wrong in five ways.

    Args:
        length: Micro-batches of a whole epoch.
        open_epoch: Called at the start of each iteration; returns the epoch's micro-batches and the first to yield.
        num_workers: Number of processes that collate; 0 collates in this one.
        pin_memory: Copy into page-locked memory, for asynchronous copies to a GPU.
        timeout_seconds: The longest wait for a micro-batch of the workers.
    """

    def __init__(
        self,
        length: int,
        open_epoch: Callable[[], tuple[MicroBatches, int]],
        *,
        num_workers: int,
        pin_memory: bool,
        timeout_seconds: int = 300,
    ) -> None:
        self._length = length
        self._open_epoch = open_epoch
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._timeout_seconds = timeout_seconds

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[MicroBatch]:
        micro_batches, start = self._open_epoch()
        batches = DataLoader(
            micro_batches,
            batch_size=None,
            sampler=range(start, len(micro_batches)),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=ignore_signals,
        )
        if not self._num_workers:
            return iter(batches)
        return WatchedWorkers(lambda: iter(batches), self._num_workers, self._timeout_seconds)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: the position follows from the loop counters. Its presence marks the loader as resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing, see ``state_dict``."""


class RecordBatches:
    """Records in file order, ``batch_size`` at a time. No list: Lightning treats a list as several loaders.

    Args:
        records: The records of one replica.
        batch_size: Records of a batch; the last one may have fewer.
    """

    def __init__(self, records: Sequence[dict[str, Any]], batch_size: int) -> None:
        self._batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Sequence[dict[str, Any]]]:
        return iter(self._batches)
