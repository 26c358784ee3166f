"""Record which attempt of a run is the current one, and from which attempts a state descends.

A step alone does not name a state: a run that resumes from step 4 reaches step 8 a second time, with other weights.
Each start of a fit is therefore an attempt with a random name, and a state is an attempt and a step. Manifests hold the
lineage of their state; ``run_state.json`` holds that of the current attempt.
"""

import json
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lightning.system.files import write_atomically

logger = logging.getLogger(__name__)

RUN_STATE = "run_state.json"


@dataclass(frozen=True)
class Lineage:
    """The attempts that a state descends from.

    Attributes:
        attempts: Pairs (name, last step that counts), oldest first. The last pair is the attempt itself, with None.
    """

    attempts: tuple[tuple[str, int | None], ...]

    @classmethod
    def new(cls) -> "Lineage":
        """Returns the lineage of an attempt that starts from step 0."""
        return cls(((secrets.token_hex(4), None),))

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> "Lineage":
        """Returns the lineage in a manifest or run state. Raises ValueError or TypeError if it is malformed."""
        # Checkpoints of earlier versions have none: together they count as one attempt without a name.
        attempts = [(name, step) for name, step in manifest.get("lineage", [["", None]])]
        if not attempts or not all(isinstance(a, str) and isinstance(b, int | None) for a, b in attempts):
            raise ValueError(attempts)
        return cls(tuple(attempts))

    def continued(self, step: int) -> "Lineage":
        """Returns the lineage of a new attempt that resumes from a step of this one."""
        *before, (name, _) = self.attempts
        return Lineage((*before, (name, step), *self.new().attempts))

    def includes(self, manifest: Mapping[str, Any]) -> bool:
        """Returns whether the state of a manifest belongs to this lineage."""
        writer, step = self.of(manifest).attempts[-1][0], manifest.get("step", 0)
        return any(writer == name and (last is None or step <= last) for name, last in self.attempts)


@dataclass(frozen=True)
class RunState:
    """The current attempt of a run.

    Attributes:
        lineage: Of the attempt.
        monitor: The metric that selects the best checkpoint, None without one.
        mode: ``min`` or ``max``.
        job: The scheduler's job, empty without a scheduler.
    """

    lineage: Lineage
    monitor: str | None = None
    mode: str = "min"
    job: str = ""

    def write(self, run: Path) -> None:
        """Writes ``run_state.json``."""
        with write_atomically(run / RUN_STATE) as file:
            json.dump({**vars(self), "lineage": self.lineage.attempts}, file)


def read_run_state(run: Path) -> RunState | None:
    """Returns the state of a run, None if the run has none. Warns if it cannot be read."""
    try:
        found = json.loads((run / RUN_STATE).read_text(encoding="utf-8"))
        monitor, mode, job = found["monitor"], found["mode"], found["job"]
        if not isinstance(monitor, str | None) or mode not in ("min", "max") or "lineage" not in found:
            raise ValueError(found)
        return RunState(Lineage.of(found), monitor, mode, str(job))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("'%s' is damaged (%s): the newest checkpoint counts", run / RUN_STATE, type(error).__name__)
        return None


def scheduler_job() -> str:
    """Returns a name of the scheduler's job that this process belongs to, the same after each restart of the job."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {job}"
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":  # torchrun's default, which names nothing; its agent outlives the workers that it restarts
        name = f"{socket.gethostname()} {os.getppid()}"
    return f"torchrun {name}" if name else ""
