"""One training run from its config to its summary: build, resume, step, log, evaluate, save."""

import time
from pathlib import Path
from typing import Any, NoReturn

from mpl_fast import distributed, models
from mpl_fast.algorithms.base import train_step
from mpl_fast.batch import Batch
from mpl_fast.config import FinetuneConfig, RolePlayConfig, RunConfig
from mpl_fast.data.loader import TrainLoader
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.distributed import DistEnv, StopFlag
from mpl_fast.errors import PREEMPTED, CheckpointError, DataError, NonFiniteError
from mpl_fast.learner import compilation, rng
from mpl_fast.training.build import (
    build_algorithm,
    check_batches,
    count_classes,
    eval_loader,
    images_per_step,
    settle_steps,
    train_loader,
)
from mpl_fast.training.checkpoint import (
    Checkpoints,
    load_start,
    newest,
    read_shared,
    restore,
    step_of,
)
from mpl_fast.training.console import Console, duration, quantity
from mpl_fast.training.evaluate import accuracy_line, evaluate
from mpl_fast.training.metrics import Meter, QueueLimiter, Row, non_finite
from mpl_fast.training.process import stop_on_signal
from mpl_fast.training.run_dir import RunDir, open_for
from mpl_fast.training.step_graph import StepGraph

PATIENCE = 10  # updates in a row that may be left out for a gradient that is not finite
IN_A_ROW = "skipped_in_a_row/"


def train(config: RunConfig) -> int:
    """Runs to the end, to `stop_at`, or until a signal; returns the process's exit code.

    Raises `UserError` for what the user can mend, on every rank that meets it.
    """
    manifest = read_manifest(config.data.root)
    config = settle_steps(config, manifest)
    classes = count_classes(config, manifest)
    dist_env = distributed.start(config.device)
    check_batches(config, manifest, dist_env)
    folder = open_for(config, dist_env)
    try:
        code = Run(config, dist_env, manifest, classes, folder).go()
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
    config = settle_steps(config, manifest)
    classes = count_classes(config, manifest)
    dist_env = distributed.start(config.device)
    console = Console(config.steps, silent=not dist_env.is_first)
    folder = Path(config.run_dir) / "checkpoints"
    checkpoint, damage = distributed.from_first(newest(folder) if dist_env.is_first else None)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no usable checkpoint {'; '.join(damage)}".strip())
    for warning in damage:
        console.warn(f"{warning}; evaluating {checkpoint.name}")
    algorithm = build_algorithm(config, manifest, classes, dist_env.device, fresh=False)
    _keep_caches(config)
    rng.seed_run(config, dist_env)
    restore(algorithm, read_shared(checkpoint), checkpoint)
    expected = manifest.splits["val"].records
    accuracy = evaluate(algorithm, eval_loader(config, manifest, dist_env), expected)
    console.say(f"{checkpoint}: {accuracy_line(accuracy)}")
    distributed.stop()
    return accuracy


def _keep_caches(config: RunConfig) -> None:
    """So that the next start of a compiled run is a warm one."""
    if config.compile != "off":
        compilation.keep_caches(Path(config.run_dir) / "compile_cache")


class Run:
    """A run in progress on one rank."""

    def __init__(
        self,
        config: RunConfig,
        dist_env: DistEnv,
        manifest: Manifest,
        classes: int,
        folder: RunDir | None,
    ) -> None:
        self.config, self.dist_env, self.manifest, self.folder = config, dist_env, manifest, folder
        self.console = Console(config.steps, silent=not dist_env.is_first)
        self.checkpoints = Checkpoints(
            Path(config.run_dir) / "checkpoints",
            keep=config.checkpoint_keep,
            rank=dist_env.rank,
            world=dist_env.world,
        )
        _keep_caches(config)
        self.checkpoint = self._newest()
        fresh = self.checkpoint is None
        self.algorithm = build_algorithm(config, manifest, classes, dist_env.device, fresh=fresh)
        rng.seed_run(config, dist_env)
        graphs = config.cuda_graphs
        self.step = StepGraph(self.algorithm).step if graphs == "step" else self.algorithm.step
        self.meter, self.stop = Meter(), StopFlag()
        self.done, self.saved, self.seconds = 0, -1, 0.0
        self.accuracy, self.best = dict[str, float](), dict[str, float]()

    def go(self) -> int:
        """Resumes if there is something to resume, trains, and says how it ended."""
        checkpoint = self.checkpoint
        if checkpoint and step_of(checkpoint) >= self.config.steps:
            return self._complete(checkpoint)
        data_state = self._resume(checkpoint)
        with stop_on_signal(self.stop.request):
            self._introduce()
            self.validation = eval_loader(self.config, self.manifest, self.dist_env)
            if self.done == 0 and isinstance(self.config.algorithm, FinetuneConfig):
                self._evaluate()  # what tuning has to beat
            finished = self._loop(
                train_loader(self.config, self.manifest, self.dist_env, data_state)
            )
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
            self._take(shared)
            self._summarize()
        elif self.folder and summary:
            top1 = f"top-1 {summary['top1']:.2f} %"
            self.console.say(f"complete already: {top1} in {self.config.run_dir}")
        return 0

    def _loop(self, loader: TrainLoader) -> bool:
        """Steps until the end (true) or an agreed stop (false)."""
        config = self.config
        self.meter = Meter()  # so that starting up does not count as training
        queue = QueueLimiter(self.dist_env.device)
        while self.done < config.steps:
            asked = time.perf_counter()
            batch = self._next(loader)
            waited = time.perf_counter() - asked
            compilation.mark_step()
            metrics = train_step(self.algorithm, batch, self.done, self.step)
            self.meter.add(metrics, waited)
            queue.step()
            self.done += 1
            last = self.done == config.steps
            if last or self.done % config.log_every == 0:
                self._log(late=not last)
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

    def _log(self, *, late: bool = False) -> None:
        """Ends a row and writes those that have arrived, for which it waits.

        `late`: not for the newest row, which a GPU is still working on.
        """
        learners = self.algorithm.learners
        if not self.meter.empty:
            rates = {f"lr/{name}": learner.lr for name, learner in learners.items()}
            skipped = {f"{IN_A_ROW}{name}": learner.skipped for name, learner in learners.items()}
            self.meter.close(self.done, rates, skipped)
        for step, row in self.meter.rows(late=int(late and self.dist_env.device.type == "cuda")):
            self._write(step, row)

    def _write(self, step: int, row: Row) -> None:
        self.seconds += row["seconds"]
        skipped = {name: row.pop(f"{IN_A_ROW}{name}") for name in self.algorithm.learners}
        for name, in_a_row in skipped.items():
            if in_a_row >= PATIENCE:
                self._spoilt(f"the last {in_a_row:.0f} updates of the {name} up to step {step}")
            if share := row[f"skipped/{name}"]:
                self.console.warn(
                    f"{round(share * row['steps'])} of {row['steps']} updates of the {name} up to "
                    f"step {step} were skipped: their gradient was not finite"
                )
        while bad := non_finite(row):
            if not any(row[f"skipped/{name}"] for name in skipped):
                self._spoilt(f"{bad} in all of the {row['steps']} steps up to {step}")
            del row[bad]  # no step of the interval had a value
        row["images_per_second"] = row["steps"] * images_per_step(self.config) / row["seconds"]
        if self.folder:
            self.folder.row(step, row)
        self.console.row(step, row)

    def _spoilt(self, what: str) -> NoReturn:
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved > 0 else "none is kept"
        raise NonFiniteError(
            f"not finite: {what} ({kept}): lower the learning rate, lengthen its warm-up or lower "
            "algorithm.*.max_grad_norm"
        )

    def _evaluate(self) -> None:
        self._log()
        began = time.perf_counter()
        expected = self.manifest.splits["val"].records
        self.accuracy = evaluate(self.algorithm, self.validation, expected)
        self.meter.pause(time.perf_counter() - began)
        if self.accuracy["top1"] > self.best.get("best_top1", -1.0):
            self.best = {"best_top1": self.accuracy["top1"], "best_step": self.done}
        values = {f"eval/{name}": value for name, value in self.accuracy.items()}
        if self.folder:
            self.folder.row(self.done, values)
        self.console.say(f"step {self.done} | evaluated: {accuracy_line(self.accuracy)}")

    def _save(self, loader: TrainLoader) -> None:
        self._log()  # a checkpoint ends a row: a stop loses none, and nothing non-finite is saved
        began = time.perf_counter()
        learners, voters = self.algorithm.learners, self.algorithm.eval_ensemble.learners
        for name, learner in learners.items():
            if not learner.finite():
                self._spoilt(f"a weight of the {name} at step {self.done}")
        shared = {
            "step": self.done,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            "best": self.best,
            "learners": {name: learner.state_dict() for name, learner in learners.items()},
            "voters": [name for name, learner in learners.items() if learner in voters],
            "algorithm": dict(self.algorithm.state),
        }
        if self.folder:
            self.folder.sync()
        mine = rng.generator_states() | {"data": loader.state()}
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
        if checkpoint is None:
            self._begin()
        else:
            shared, mine = self.checkpoints.load(checkpoint)
            restore(self.algorithm, shared, checkpoint)
            self._take(shared)
            self.saved = self.done
            rng.restore_generators(mine)
            data_state = mine["data"]
            self.console.say(f"resuming after step {self.done} from {checkpoint}")
        if self.folder:
            self.folder.resume_at(self.done if checkpoint else -1)
        return data_state

    def _begin(self) -> None:
        """A run without a checkpoint of its own; fine-tuning then begins with another run's."""
        tuning = self.config.algorithm
        if isinstance(tuning, FinetuneConfig):
            learner = self.algorithm.learners["learner"]
            told, warnings = load_start(tuning, learner, self.config.model.name, self.dist_env)
            for warning in warnings:
                self.console.warn(warning)
            self.console.say(told)

    def _take(self, shared: dict[str, Any]) -> None:
        """How far a checkpoint's run had come; older ones do not know their best evaluation."""
        self.done, self.seconds = shared["step"], shared["seconds"]
        self.accuracy, self.best = shared["accuracy"], shared.get("best", {})

    def _introduce(self) -> None:
        config, learners = self.config, self.algorithm.learners
        sizes = {models.count_parameters(learner.network) for learner in learners.values()}
        self.console.say(
            f"{config.recipe} on {self.dist_env.world} x {self.dist_env.device.type}: "
            f"{config.model.name}, "
            f"{quantity(max(sizes))} trained parameters, {len(self.manifest.classes)} classes, "
            f"{config.labeled_batch} labeled + {images_per_step(config) - config.labeled_batch} "
            f"unlabeled images a step, {config.steps} steps, run directory {config.run_dir}"
        )
        if config.model.pretrained and self.checkpoint is None:
            self.console.say(
                f"begins with the weights of {config.model.pretrained}; those of the last layer "
                f"are taken if they are for {len(self.manifest.classes)} classes"
            )
        waits = {name: learner.config.delay_steps for name, learner in learners.items()}
        if isinstance(config.algorithm, RolePlayConfig):
            waits["student"] = config.algorithm.student_delay_steps
        for name, wait in waits.items():
            if wait >= config.steps:
                self.console.warn(
                    f"the {name} never moves: its wait of {wait} steps "
                    f"is not over in a run of {config.steps}"
                )
        if config.compile != "off" and self.done < config.steps:
            self.console.say("compiling during the first steps, which takes minutes")

    def _summarize(self) -> None:
        summary = {
            "recipe": self.config.recipe,
            "steps": self.done,
            **self.accuracy,
            **self.best,
            "seconds": self.seconds,
            "images_per_second": self.done * images_per_step(self.config) / self.seconds,
            "run_dir": self.config.run_dir,
        }
        if self.folder:
            self.folder.summarize(summary)
        best = "best {best_top1:.2f} % at step {best_step}".format(**self.best) if self.best else ""
        self.console.say(
            f"done: top-1 {self.accuracy['top1']:.2f} %{best and f' ({best})'} "
            f"in {duration(self.seconds)} of training, "
            f"{summary['images_per_second']:.0f} images/s; {self.config.run_dir}/summary.json"
        )
