"""One training run from its config to its summary: build, resume, step, log, evaluate, save."""

import time
from pathlib import Path
from typing import Any

from mpl_fast import distributed, models, randomness
from mpl_fast.algorithms.base import Algorithm, train_step
from mpl_fast.assembly import (
    build_algorithm,
    check_batches,
    count_classes,
    eval_loader,
    images_per_step,
    train_loader,
)
from mpl_fast.batch import Batch
from mpl_fast.checkpoint import Checkpoints, newest, read_shared, step_of
from mpl_fast.config import RunConfig
from mpl_fast.console import Console, duration
from mpl_fast.data.loader import TrainLoader
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.distributed import Place, StopFlag
from mpl_fast.errors import (
    PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    UserError,
)
from mpl_fast.evaluate import evaluate
from mpl_fast.interrupts import stopping_by
from mpl_fast.metrics import Meter, non_finite
from mpl_fast.rundir import RunDir


def train(config: RunConfig) -> int:
    """Runs to the end, to `stop_at`, or until a signal; returns the process's exit code.

    Raises `UserError` for what the user can mend, on every rank that meets it.
    """
    manifest = read_manifest(config.data.root)
    classes = count_classes(config, manifest)
    place = distributed.start(config.device)
    check_batches(config, manifest, place)
    folder = _open_folder(config, place)
    try:
        code = Run(config, place, manifest, classes, folder).go()
    finally:
        if folder:
            folder.close()
    # Only here: after a failure the other ranks may wait in a collective, and leaving would wait
    # for them instead of telling what happened.
    distributed.stop()
    return code


def evaluate_run(config: RunConfig) -> dict[str, float]:
    """Evaluates the newest checkpoint of `config.run_dir` and prints one line.

    Raises `UserError` as `train` does, and `CheckpointError` if there is none that fits.
    """
    manifest = read_manifest(config.data.root)
    classes = count_classes(config, manifest)
    place = distributed.start(config.device)
    console = Console(config.steps, silent=not place.is_first)
    folder = Path(config.run_dir) / "checkpoints"
    checkpoint, damage = distributed.from_first(newest(folder) if place.is_first else None)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no usable checkpoint {'; '.join(damage)}".strip())
    for warning in damage:
        console.warn(f"{warning}; evaluating {checkpoint.name}")
    algorithm = build_algorithm(config, classes, place.device)
    randomness.prepare(config, place)
    _load(algorithm, read_shared(checkpoint), checkpoint)
    expected = manifest.splits["val"].records
    accuracy = evaluate(algorithm, eval_loader(config, manifest, place), expected)
    console.say(f"{checkpoint}: {_accuracy_line(accuracy)}")
    distributed.stop()
    return accuracy


class Run:
    """A run in progress on one rank."""

    def __init__(
        self,
        config: RunConfig,
        place: Place,
        manifest: Manifest,
        classes: int,
        folder: RunDir | None,
    ) -> None:
        self.config, self.place, self.manifest, self.folder = config, place, manifest, folder
        self.console = Console(config.steps, silent=not place.is_first)
        self.algorithm = build_algorithm(config, classes, place.device)
        randomness.prepare(config, place)
        self.checkpoints = Checkpoints(
            Path(config.run_dir) / "checkpoints",
            keep=config.checkpoint_keep,
            rank=place.rank,
            world=place.world,
        )
        self.meter, self.stop = Meter(), StopFlag()
        self.done, self.saved, self.seconds, self.accuracy = 0, -1, 0.0, dict[str, float]()

    def go(self) -> int:
        """Resumes if there is something to resume, trains, and says how it ended."""
        checkpoint = self._newest()
        if checkpoint and step_of(checkpoint) >= self.config.steps:
            return self._complete(checkpoint)
        data_state = self._resume(checkpoint)
        with stopping_by(self.stop.wish):
            self._introduce()
            self.validation = eval_loader(self.config, self.manifest, self.place)
            finished = self._loop(train_loader(self.config, self.manifest, self.place, data_state))
        if finished:
            self._summarize()
            return 0
        if self.done == self.config.stop_at:
            self.console.say(f"paused after step {self.done}: the same command goes on from here")
            return 0
        self.console.say(
            f"stopped by a signal after step {self.done}, saved: the same command resumes"
        )
        return PREEMPTED

    def _complete(self, checkpoint: Path) -> int:
        """Nothing is left to train; a kill may have come before the summary was written."""
        if self.folder and not (summary := self.folder.summary()):
            shared = read_shared(checkpoint)
            self.done, self.seconds = shared["step"], shared["seconds"]
            self.accuracy = shared["accuracy"]
            self._summarize()
        elif self.folder and summary:
            top1 = f"top-1 {summary['top1']:.2f} %"
            self.console.say(f"complete already: {top1} in {self.config.run_dir}")
        return 0

    def _loop(self, loader: TrainLoader) -> bool:
        """Steps until the end (true) or an agreed stop (false)."""
        config = self.config
        self.meter = Meter()  # so that starting up does not count as training
        while self.done < config.steps:
            asked = time.perf_counter()
            batch = self._next(loader)
            waited = time.perf_counter() - asked
            metrics = train_step(self.algorithm, batch, self.done)
            self.meter.add(metrics, waited)
            self.done += 1
            last = self.done == config.steps
            if last or self.done % config.log_every == 0:
                self._log()
            self.console.tick(self.done)
            pausing = self.stop.agreed() or self.done == config.stop_at
            if last or (config.eval_every and self.done % config.eval_every == 0):
                self._evaluate()
            due = config.checkpoint_every and self.done % config.checkpoint_every == 0
            if last or due or pausing:
                self._save(loader)
            if pausing and not last:
                return False
        return True

    def _log(self) -> None:
        """The one place where a running loop waits for the device."""
        if self.meter.empty:
            return
        row = self.meter.row()
        self.seconds += row["seconds"]
        if bad := non_finite(row):
            kept = (
                f"the checkpoint of step {self.saved} is kept"
                if self.saved > 0
                else "none was saved"
            )
            raise NonFiniteError(
                f"{bad} became {row[bad]} in the {row['steps']:.0f} steps up to {self.done} "
                f"({kept}): "
                "lower the learning rate, lengthen its warm-up or lower algorithm.*.clip"
            )
        row["images_per_second"] = row["steps"] * images_per_step(self.config) / row["seconds"]
        for name, learner in self.algorithm.learners.items():
            row[f"lr/{name}"] = learner.config.lr_at(self.done - 1, self.config.steps)
        if self.folder:
            self.folder.row(self.done, row)
        self.console.row(self.done, row)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        expected = self.manifest.splits["val"].records
        self.accuracy = evaluate(self.algorithm, self.validation, expected)
        self.meter.pause(time.perf_counter() - began)
        values = {f"eval/{name}": value for name, value in self.accuracy.items()}
        if self.folder:
            self.folder.row(self.done, values)
        self.console.say(f"step {self.done} | evaluated: {_accuracy_line(self.accuracy)}")

    def _save(self, loader: TrainLoader) -> None:
        self._log()  # a checkpoint ends a row: a stop loses none, and nothing non-finite is saved
        began = time.perf_counter()
        learners = self.algorithm.learners
        for name, learner in learners.items():
            if not learner.finite():
                raise NonFiniteError(
                    f"a weight of the {name} is not finite at step {self.done}: lower its lr"
                )
        shared = {
            "step": self.done,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "learners": {name: learner.state_dict() for name, learner in learners.items()},
        }
        if self.folder:
            self.folder.sync()
        mine = randomness.state() | {"data": loader.state()}
        try:
            self.checkpoints.save(self.done, shared, mine)
        except OSError as error:
            told = CheckpointError(
                f"the checkpoint of step {self.done} cannot be written: {error.strerror} "
                f"({error.filename or self.checkpoints.folder}); earlier ones are untouched"
            )
            told.alone = True
            raise told from None
        self.saved = self.done
        self.meter.pause(time.perf_counter() - began)

    def _next(self, loader: TrainLoader) -> Batch:
        try:
            return next(loader)
        except DataError as error:
            error.alone = True  # a record that this rank alone was to read
            raise

    def _newest(self) -> Path | None:
        """The newest good checkpoint, with a warning for each damaged one that is passed over."""
        checkpoint, damage = self.checkpoints.newest()
        for warning in damage:
            fallback = checkpoint.name if checkpoint else "none"
            self.console.warn(f"{warning}; falling back to {fallback}")
        return checkpoint

    def _resume(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """Takes everything from a checkpoint; returns the data loader's part of it."""
        data_state = None
        if checkpoint is not None:
            shared, mine = self.checkpoints.load(checkpoint)
            _load(self.algorithm, shared, checkpoint)
            self.done = self.saved = shared["step"]
            self.seconds, self.accuracy = shared["seconds"], shared["accuracy"]
            randomness.restore(mine)
            data_state = mine["data"]
            self.console.say(f"resuming after step {self.done} from {checkpoint}")
        if self.folder:
            self.folder.resume_at(self.done)
        return data_state

    def _introduce(self) -> None:
        config, learners = self.config, self.algorithm.learners
        sizes = {models.count_parameters(learner.network) for learner in learners.values()}
        self.console.say(
            f"{config.recipe} on {self.place.world} x {self.place.device.type}: "
            f"{config.model.name}, "
            f"{max(sizes) / 1e6:.2f} M parameters, {len(self.manifest.classes)} classes, "
            f"{config.labeled_batch} labeled + {images_per_step(config) - config.labeled_batch} "
            f"unlabeled images a step, {config.steps} steps, run directory {config.run_dir}"
        )
        for name, learner in learners.items():
            if learner.config.wait >= config.steps:
                self.console.warn(
                    f"the {name} never moves: its wait of {learner.config.wait} steps "
                    f"is not over in a run of {config.steps}"
                )
        if config.compile != "off" and self.done < config.steps:
            self.console.say("compiling during the first steps, which takes minutes")

    def _summarize(self) -> None:
        summary = {
            "recipe": self.config.recipe,
            "steps": self.done,
            **self.accuracy,
            "seconds": self.seconds,
            "images_per_second": self.done * images_per_step(self.config) / self.seconds,
            "run_dir": self.config.run_dir,
        }
        if self.folder:
            self.folder.summarize(summary)
        self.console.say(
            f"done: top-1 {self.accuracy['top1']:.2f} % in {duration(self.seconds)} of training, "
            f"{summary['images_per_second']:.0f} images/s; {self.config.run_dir}/summary.json"
        )


def _accuracy_line(accuracy: dict[str, float]) -> str:
    return "top-1 {top1:.2f} %, top-5 {top5:.2f} % of {count:.0f} images".format(**accuracy)


def _load(algorithm: Algorithm, shared: dict[str, Any], checkpoint: Path) -> None:
    try:
        for name, learner in algorithm.learners.items():
            learner.load_state_dict(shared["learners"][name])
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{checkpoint} is of another network or recipe: {reason}") from None


def _open_folder(config: RunConfig, place: Place) -> RunDir | None:
    """The run directory on rank 0; its refusal reaches every rank."""
    folder, refusal = None, None
    if place.is_first:
        try:
            folder = RunDir(config)
        except UserError as error:
            refusal = error
    if refusal := distributed.from_first(refusal):
        raise refusal
    if not all(distributed.gather((Path(config.run_dir) / "config.yaml").exists())):
        raise ConfigError(
            f"run_dir {config.run_dir} is not the same folder for all ranks: "
            "give a path on a file system that all machines share"
        )
    return folder
