"""A run's checkpoints as training writes and reads them, and the same bytes handled plainly."""

import hashlib
import os
from pathlib import Path
from typing import Any

from mpl_fast.algorithms.base import Algorithm
from mpl_fast.learner import rng
from mpl_fast.training.checkpoint import Checkpoints, newest, restore

BLOCK = 1 << 22  # bytes read at a time, as verifying does


class Saving:
    """One checkpoint is there from the beginning; each `save` adds one, and the oldest goes."""

    def __init__(self, algorithm: Algorithm, folder: Path) -> None:
        self._algorithm, self._plain = algorithm, folder / "plain"
        self._checkpoints = Checkpoints(folder / "checkpoints", keep=2, rank=0, world=1)
        self._step = 0
        self.save()
        self._content = b"".join(
            file.read_bytes() for file in sorted(self._latest.iterdir()) if file.suffix == ".pt"
        )
        self.plain_write()

    @property
    def bytes(self) -> int:
        """Of a checkpoint."""
        return len(self._content)

    def save(self) -> None:
        """What training waits for."""
        algorithm, self._step = self._algorithm, self._step + 1
        shared: dict[str, Any] = {
            "step": self._step,
            "learners": {name: x.state_dict() for name, x in algorithm.learners.items()},
            "algorithm": dict(algorithm.state),
        }
        self._latest = self._checkpoints.save(self._step, shared, rng.generator_states())

    def verify(self) -> None:
        """Finds the newest good checkpoint, by its checksums."""
        found, damage = newest(self._checkpoints.folder)
        if found != self._latest or damage:
            raise AssertionError(f"{found} is not {self._latest}: {damage}")

    def load(self) -> dict[str, Any]:
        """Into host memory."""
        return self._checkpoints.load(self._latest)[0]

    def resume(self) -> None:
        """All that lies between a new process's networks and those of the checkpoint."""
        self.verify()
        restore(self._algorithm, self.load(), self._latest)

    def plain_write(self) -> None:
        """The same bytes to one file, synced."""
        with self._plain.open("wb") as file:
            file.write(self._content)
            file.flush()
            os.fsync(file.fileno())

    def plain_read(self) -> None:
        """The same bytes from one file."""
        with self._plain.open("rb") as file:
            while file.read(BLOCK):
                pass

    def plain_hash(self) -> None:
        """SHA-256 of the same bytes."""
        hashlib.sha256(self._content).digest()
