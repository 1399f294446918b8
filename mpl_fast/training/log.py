"""The log of a run: rows of metrics are closed, checked, written and printed.

A row ends the run if training has diverged by it, or if its labels are of no class.
"""

import socket

from mpl_fast import distributed
from mpl_fast.algorithms.base import Algorithm, Metrics
from mpl_fast.batch import Batch, within_classes, wrong_labels
from mpl_fast.config import RunConfig
from mpl_fast.data.manifest import Manifest
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import NonFiniteError
from mpl_fast.training.checkpoint import Checkpoints
from mpl_fast.training.console import Console
from mpl_fast.training.introduction import called
from mpl_fast.training.metrics import Meter, Row, Spikes, non_finite, pop_rank_seconds
from mpl_fast.training.run_dir import RunDir
from mpl_fast.training.watchdog import Stragglers

MAX_SKIPPED_IN_A_ROW = 10  # updates skipped for a non-finite gradient before the run ends
IN_A_ROW, WRONG_LABELS = "skipped_in_a_row/", "wrong_labels/"  # metrics that are in no row


class Log:
    """Is on all ranks, which have equal rows and stop together; the first writes and prints."""

    def __init__(
        self,
        config: RunConfig,
        dist_env: DistEnv,
        manifest: Manifest,
        algorithm: Algorithm,
        checkpoints: Checkpoints,
        console: Console,
        run_dir: RunDir | None,
    ) -> None:
        self.meter = Meter()
        self.train_seconds = 0.0
        """Of all rows up to now, of earlier sessions too."""
        self._config, self._dist_env, self._manifest = config, dist_env, manifest
        self._learners, self._checkpoints = algorithm.learners, checkpoints
        self._console, self._run_dir = console, run_dir
        self._spikes = Spikes()
        self._stragglers = Stragglers(distributed.all_gather_object(socket.gethostname()))

    def close(self, step: int, *, late: bool = False) -> None:
        """Closes the present row after `step` steps and writes all closed rows, waiting for the
        device.

        `late`: on a GPU, does not wait for the newest row, whose steps may still be running. Raises
        `NonFiniteError` if training diverged, `DataError` for labels of no class.
        """
        if not self.meter.empty:
            rates = {f"lr/{name}": learner.lr for name, learner in self._learners.items()}
            skipped = {f"{IN_A_ROW}{name}": one.skipped for name, one in self._learners.items()}
            self.meter.close(step, rates, skipped)
        for at, row in self.meter.rows(late=int(late and self._dist_env.device.type == "cuda")):
            self._write(at, row)

    def _write(self, step: int, row: Row) -> None:
        self.train_seconds += row["train_seconds"]
        seconds = pop_rank_seconds(row, self._dist_env.device)
        for warning in self._stragglers.add(seconds, round(row["steps"])):
            self._console.warn(warning)
        self._check_labels(row)
        self._check_finite(step, row)
        factor = self._config.spike_factor if self._config.on_spike == "rollback" else 0.0
        if factor and (spike := self._spikes.add(row, factor)):
            raise diverged(f"{spike} up to step {step}", self._checkpoints)
        row["images_per_second"] = row["steps"] * self._config.images / row["train_seconds"]
        if self._run_dir:
            self._run_dir.row(step, row)
            self._run_dir.status.update(images_per_second=row["images_per_second"])
        self._console.row(step, row)

    def _check_labels(self, row: Row) -> None:
        for split in ("labeled", "unlabeled"):
            if wrong := row.pop(f"{WRONG_LABELS}{split}") * row["steps"] * self._dist_env.world:
                classes = len(self._manifest.classes)
                raise wrong_labels(wrong, split, classes, self._manifest.root)

    def _check_finite(self, step: int, row: Row) -> None:
        """Removes values that are not finite because updates were skipped, with a warning."""
        in_a_row = {name: row.pop(f"{IN_A_ROW}{name}") for name in self._learners}
        for name, updates in in_a_row.items():
            if updates >= MAX_SKIPPED_IN_A_ROW:
                what = f"not finite: the last {updates:.0f} updates of {called(name)} up to step "
                raise diverged(f"{what}{step}", self._checkpoints)
            if share := row[f"skipped/{name}"]:
                self._console.warn(
                    f"{round(share * row['steps'])} of {row['steps']} updates of {called(name)} "
                    f"up to step {step} were skipped: their gradient was not finite"
                )
        while bad := non_finite(row):
            if not any(row[f"skipped/{name}"] for name in self._learners):
                what = f"not finite: {bad} in all of the {row['steps']} steps up to {step}"
                raise diverged(what, self._checkpoints)
            del row[bad]  # no step of the interval had a finite value


def with_valid_labels(batch: Batch, classes: int) -> tuple[Batch, Metrics]:
    """The batch with labels of classes only, and how many had to be changed, by split: they end
    the run when they are read, with the next row."""
    labels, wrong = within_classes(batch.labels, classes)
    truth, wrong_truth = within_classes(batch.truth, classes, lowest=-1)  # -1: none
    counts = {f"{WRONG_LABELS}labeled": wrong, f"{WRONG_LABELS}unlabeled": wrong_truth}
    return batch._replace(labels=labels, truth=truth), counts


def diverged(what: str, checkpoints: Checkpoints) -> NonFiniteError:
    """The error of training that has diverged. A collective."""
    checkpoints.finish()
    saved = checkpoints.saved
    kept = f"the checkpoint of step {saved} is kept" if saved > 0 else "none is kept"
    return NonFiniteError(
        f"{what} ({kept}): lower the learning rate, lengthen its warm-up or lower "
        "algorithm.*.max_grad_norm"
    )
