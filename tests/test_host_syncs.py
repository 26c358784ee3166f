"""Test that the host waits for the device once per optimizer step, and never in between.

A GPU works through a queue, and idles when the host waits for the queue to become empty before it adds more. Here a CPU
stands in for the device: weights and micro-batches count as being on it, as does everything computed from them or made
on their device, and the test records what would make the host wait for such a tensor.
"""

import traceback
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sft_lightning import HFCheckpoint, SFTModule
from sft_lightning.training.callbacks.progress import StepProgress
from sft_lightning.training.callbacks.row_losses import RowLossRecorder
from sft_lightning.training.callbacks.throughput import Throughput
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger

# Their result, or its shape, depends on values that the host must read.
WAITING_OPS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# With `device=`, these make a tensor on the device without a copy from the host.
FACTORIES = ("arange", "empty", "full", "ones", "zeros")
ACCUMULATE = 3


def where():
    """Returns the innermost line that is neither torch's nor this test's, and the innermost of this package."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename]
    own = [frame for frame in frames if "/sft_lightning/" in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (frames[-1], *own[-1:]))


class ImaginedDevice(TorchDispatchMode):
    """Tracks tensors on the device, and records in ``found`` the operations that make the host wait for it."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._on_device = WeakTensorKeyDictionary()

    def put(self, *tensors):
        for tensor in tensors:
            self._on_device[tensor] = True

    def holds(self, tree):
        return any(isinstance(leaf, torch.Tensor) and leaf in self._on_device for leaf in tree_leaves(tree))

    def waits(self, what):
        self.found.append(f"{what} at {where()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.holds((args, kwargs)):
            if self._is_waiting(func, args):
                self.waits(str(func))
            self.put(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result

    @staticmethod
    def _is_waiting(func, args):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_"):  # a boolean mask becomes positions first
            return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return name in WAITING_OPS or str(func) == "aten.repeat_interleave.Tensor"

    @contextmanager
    def used(self, monkeypatch):
        """Also tracks calls that are not operators on a CPU: copies to the host, and tensors made on the device."""
        make_tensor, make_like = torch.tensor, torch.Tensor.new_tensor

        def new_tensor(like, *args, **kwargs):
            made = make_like(like, *args, **kwargs)
            if like in self._on_device:
                self.waits("new_tensor")
                self.put(made)
            return made

        def tensor(*args, **kwargs):
            made = make_tensor(*args, **kwargs)
            if kwargs.get("device") is not None:
                self.waits("torch.tensor(..., device=)")
                self.put(made)
            return made

        with monkeypatch.context() as patches:
            for name in ("tolist", "numpy", "cpu"):
                patches.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
            for name in FACTORIES:
                patches.setattr(torch, name, self._followed(getattr(torch, name)))
            patches.setattr(torch, "tensor", tensor)
            patches.setattr(torch.Tensor, "new_tensor", new_tensor)
            with self:
                yield

    def _followed(self, factory):
        def followed(*args, **kwargs):
            made = factory(*args, **kwargs)
            if isinstance(kwargs.get("device"), torch.device):
                self.put(made)
            return made

        return followed

    def _watched(self, name, method):
        def watched(tensor, *args, **kwargs):
            if tensor in self._on_device:
                self.waits(name)
            return method(tensor, *args, **kwargs)

        return watched


class RealDevice:
    """The same on a GPU, where torch warns of each wait."""

    def __init__(self):
        self._warnings = []

    @property
    def found(self):
        return [
            f"{warning.filename}:{warning.lineno}"
            for warning in self._warnings
            if "synchronizing CUDA operation" in str(warning.message)
        ]

    def put(self, *tensors):
        assert all(tensor.is_cuda for tensor in tensors)

    @contextmanager
    def used(self, monkeypatch):
        with warnings.catch_warnings(record=True) as self._warnings:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def tensors_of(thing):
    values = [getattr(thing, name) for name in getattr(thing, "__slots__", ())]
    return [value for value in values if isinstance(value, torch.Tensor)]


class Watch(Callback):
    """Listed first: marks what was found when each micro-batch began, after the callbacks of the previous one."""

    def __init__(self, device, monkeypatch):
        self.device = device
        self.marks = []
        self._monkeypatch = monkeypatch
        self._stack = ExitStack()

    def on_train_start(self, trainer, module):
        # Not earlier: transformers loads a model on its own devices, with constructors that must be torch's.
        self._stack.enter_context(self.device.used(self._monkeypatch))
        self.device.put(*module.parameters(), *module.buffers())

    def on_train_batch_start(self, trainer, module, batch, index):
        self.device.put(*tensors_of(batch), *tensors_of(batch.segments))
        self.marks.append(len(self.device.found))

    def on_train_epoch_end(self, trainer, module):
        self.marks.append(len(self.device.found))
        self.close()

    def close(self):
        self._stack.close()

    @property
    def waits(self):
        """What was found in each micro-batch."""
        return [self.device.found[begin:end] for begin, end in zip(self.marks[:-1], self.marks[1:], strict=True)]


@pytest.fixture
def waits_of_a_fit(make_trainer, make_data, model_folder, train_file, tmp_path, monkeypatch):
    """Trains one epoch as the command line does, logging every step, and returns the waits of each micro-batch."""

    def fit(device, layout="padded", **options):
        watch = Watch(device, monkeypatch)
        trainer = make_trainer(
            watch,
            Throughput(),
            StepProgress(every_n_steps=1),
            RowLossRecorder(str(tmp_path / "run")),
            HFCheckpoint(str(tmp_path / "run"), every_n_train_steps=1000),
            logger=MetricsCSVLogger(str(tmp_path / "run")),
            enable_progress_bar=True,
            max_epochs=1,
            accumulate_grad_batches=ACCUMULATE,
            gradient_clip_val=1.0,
            **options,
        )
        try:
            module = SFTModule(model_folder, lr_schedule="cosine", warmup_steps=2)
            trainer.fit(module, make_data(train_file, batch_size=4, layout=layout))
        finally:
            watch.close()
        assert len(watch.waits) == 12, "42 rows are four steps of three micro-batches"
        return watch.waits

    return fit


def assert_one_wait_per_step(waits):
    for index, found in enumerate(waits):
        allowed = 1 if (index + 1) % ACCUMULATE == 0 else 0
        assert len(found) <= allowed, f"micro-batch {index}:\n" + "\n".join(found)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_the_host_waits_once_per_optimizer_step(waits_of_a_fit, layout, precision):
    waits = waits_of_a_fit(ImaginedDevice(), layout=layout, precision=precision)
    assert_one_wait_per_step(waits)
    assert all(waits[ACCUMULATE - 1 :: ACCUMULATE]), "the wait at the end of a step was not seen"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
def test_the_host_waits_once_per_optimizer_step_on_a_gpu(waits_of_a_fit, layout):
    waits = waits_of_a_fit(RealDevice(), layout=layout, accelerator="cuda", precision="bf16-mixed")
    assert_one_wait_per_step(waits[ACCUMULATE:])  # the first step makes the optimizer's state and loads kernels


@pytest.mark.parametrize(
    "careless",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss * 2),
        lambda loss: bool(loss.isnan().any()),
        lambda loss: (loss + 1).tolist(),
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().numpy(),
        lambda loss: loss.expand(2).nonzero(),
        lambda loss: torch.ones(2)[(loss > 0).expand(2)],
        lambda loss: torch.ones(2).index_put_(((loss > 0).expand(2),), torch.zeros(())),
        lambda loss: torch.equal(loss, loss),
        lambda loss: torch.tensor(1.0, device=loss.device),
        lambda loss: bool((torch.arange(3, device=loss.device) == 1).all()),
    ],
)
def test_every_wait_is_seen(monkeypatch, careless):
    layer, device = torch.nn.Linear(2, 1), ImaginedDevice()
    device.put(*layer.parameters())
    with device.used(monkeypatch):
        loss = layer(torch.ones(2)).sum()
        assert not device.found
        careless(loss)
    assert len(device.found) == 1


def test_a_wait_for_a_gradient_is_seen(monkeypatch):
    layer, device = torch.nn.Linear(2, 1), ImaginedDevice()
    device.put(*layer.parameters())
    with device.used(monkeypatch):
        layer(torch.ones(2)).sum().backward()
        assert not device.found
        layer.weight.grad.norm().item()
    assert len(device.found) == 1


def test_numbers_of_the_host_are_free(monkeypatch):
    device = ImaginedDevice()
    device.put(torch.nn.Linear(2, 1).weight)
    with device.used(monkeypatch):
        assert torch.tensor(1.0).clone().item() == 1
        assert (torch.ones(3) * 2).sum().tolist() == 6
    assert not device.found
