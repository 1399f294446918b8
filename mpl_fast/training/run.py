"""One training run from its config to its summary: build, resume, step, log, evaluate, save."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from mpl_fast import distributed, models
from mpl_fast.algorithms.base import Teacher, train_step
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.batch import Batch, Loader
from mpl_fast.config import FinetuneConfig, NoisyStudentConfig, RunConfig
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.data.randaugment import gray_views
from mpl_fast.distributed import DistEnv, StopFlag
from mpl_fast.errors import PREEMPTED, CheckpointError, ConfigError, DataError, NonFiniteError
from mpl_fast.learner import compilation, rng
from mpl_fast.training.auto import resolve
from mpl_fast.training.best import Best
from mpl_fast.training.build import (
    build_algorithm,
    check_batches,
    count_classes,
    eval_loader,
    resolve_epochs,
    train_loader,
)
from mpl_fast.training.checkpoint import (
    Checkpoints,
    check_same_classes,
    checkpoints_in,
    load_start,
    no_class_names,
    read_shared,
    restore,
    step_of,
)
from mpl_fast.training.console import Console, duration, quantity
from mpl_fast.training.evaluate import accuracy_line, evaluate
from mpl_fast.training.metrics import Meter, QueueLimiter, Row, moment, non_finite
from mpl_fast.training.process import stop_on_signal
from mpl_fast.training.run_dir import RunDir, keep_compile_cache, open_for, other_images
from mpl_fast.training.saving import State
from mpl_fast.training.step_graph import StepGraph
from mpl_fast.training.teacher import load_teacher
from mpl_fast.training.trial import check_training

MAX_SKIPPED_IN_A_ROW = 10  # updates skipped for a non-finite gradient before the run ends
IN_A_ROW = "skipped_in_a_row/"


def train(config: RunConfig, *later: RunConfig) -> int:
    """Trains to the end, to `stop_at` or until a signal; returns the exit code.

    The runs of `later` configs follow, each when the one before is complete. Raises `UserError` for
    what the user can correct, on every rank where it occurs.
    """
    prepared = [_prepared(one) for one in (config, *later)]
    dist_env = distributed.init(config.device)
    for config, manifest, classes in prepared:
        check_batches(config, manifest, dist_env)
        check_training(config, classes, dist_env.world)
    code = 0
    for number, (config, manifest, classes) in enumerate(prepared):
        if number:
            compilation.release()
        run_dir = open_for(config, dist_env)
        try:
            run = Run(config, dist_env, manifest, classes, run_dir)
            if not run.ended:
                _check_not_begun(later[number:], config)
            code = run.go()
        finally:
            if run_dir:
                run_dir.close()
        if not run.complete:
            break
        if prepared[number + 1 :] and any(distributed.all_gather_object(run.stop.requested)):
            run.console.print("stopped by a signal: the same command goes on with the next run")
            code = PREEMPTED
            break
        del run
    return code


def _prepared(config: RunConfig) -> tuple[RunConfig, Manifest, int]:
    """The config with its length in steps, the data, and the number of classes."""
    manifest = read_manifest(config.data.root)
    config = resolve_epochs(config, manifest)
    return config, manifest, count_classes(config, manifest)


def _check_not_begun(later: Sequence[RunConfig], config: RunConfig) -> None:
    """Raises `ConfigError` if a later run has begun from an earlier end of this one, which would go
    on."""
    for one in later:
        if checkpoints_in(Path(one.run_dir) / CHECKPOINTS["newest"]):
            raise ConfigError(
                f"{one.run_dir} has begun from an earlier end of {config.run_dir}, which now goes "
                "on: move it to another place, or give the --patience of before"
            )


class Run:
    """The training run of one rank."""

    def __init__(
        self,
        config: RunConfig,
        dist_env: DistEnv,
        manifest: Manifest,
        classes: int,
        run_dir: RunDir | None,
    ) -> None:
        """`run_dir` is None on all ranks but the first."""
        # The run directory has the config as it was given.
        config, self.chosen = resolve(config, dist_env.device, distributed.machines())
        self.config, self.dist_env, self.manifest = config, dist_env, manifest
        self.run_dir = run_dir
        self.console = Console(config.steps, silent=not dist_env.is_rank0)
        self.checkpoints = Checkpoints(
            Path(config.run_dir) / CHECKPOINTS["newest"],
            keep=config.checkpoint_keep,
            rank=dist_env.rank,
            world=dist_env.world,
        )
        keep_compile_cache(config)
        self.checkpoint = self._newest_checkpoint()
        fresh, self.notes = self.checkpoint is None, list[str]()
        self.best = Best(config, dist_env)
        self.ended = self.checkpoint is not None and self._ended_with(self.checkpoint)
        self.algorithm = build_algorithm(
            config,
            manifest,
            classes,
            dist_env.device,
            fresh=fresh,
            notes=self.notes,
            teacher=self._teacher(fresh=fresh),
        )
        rng.seed_run(config, dist_env)
        self.checkpoints.failed = self._not_saved
        graphs = config.cuda_graphs
        self.step = StepGraph(self.algorithm).step if graphs == "step" else self.algorithm.step
        self.meter, self.stop = Meter(), StopFlag()
        self.steps_done, self.train_seconds = 0, 0.0
        self.complete = False
        self.accuracy = dict[str, float]()

    def go(self) -> int:
        """Resumes from the newest checkpoint if there is one, trains, and returns the exit code."""
        checkpoint = self.checkpoint
        if checkpoint and self.ended:
            self.complete = True
            return self._already_complete(checkpoint)
        if checkpoint:
            data_state = self._resume(checkpoint)
        else:
            data_state = None
            self._start()
        if self.run_dir:
            self.run_dir.resume_at(self.steps_done if checkpoint else -1)
        with stop_on_signal(self._request_stop), closing(self.checkpoints):
            self._introduce()
            self.validation = eval_loader(self.config, self.manifest, self.dist_env)
            loader = train_loader(self.config, self.manifest, self.dist_env, data_state)
            if not checkpoint and isinstance(self.config.algorithm, FinetuneConfig):
                self._evaluate()  # the accuracy before fine-tuning
                if self.best.keeps(self.steps_done):
                    self._save(loader)
            finished = self._loop(loader)
        if finished:
            self._summarize()
            self.complete = True
            return 0
        done = self.steps_done
        if done == self.config.stop_at:
            self.console.print(f"paused after step {done}: the same command resumes")
            return 0
        self.console.print(
            f"stopped by a signal after step {done}, saved: the same command resumes"
        )
        return PREEMPTED

    def _teacher(self, *, fresh: bool) -> Teacher | None:
        """The fixed teacher, for the recipe that has one."""
        algorithm = self.config.algorithm
        if not isinstance(algorithm, NoisyStudentConfig):
            return None
        loaded = load_teacher(
            self.config, algorithm, self.manifest.classes, self.dist_env.device, fresh=fresh
        )
        for warning in loaded.warnings:
            self.console.warn(warning)
        self.notes.append(loaded.message)
        return loaded.teacher

    def _request_stop(self) -> None:
        """In a signal handler."""
        if not self.stop.requested:
            self.console.print_in_signal_handler(
                "train: stopping: saves a checkpoint after this step, or after a running evaluation"
            )
        self.stop.request()

    def _ended_with(self, checkpoint: Path) -> bool:
        """Whether the run ended with this checkpoint, early or not."""
        if self.config.patience:
            self.best.restore(read_shared(checkpoint))
        return step_of(checkpoint) >= self.config.steps or self.best.stopped_early

    def _already_complete(self, checkpoint: Path) -> int:
        """Prints the result; writes what a kill came before."""
        self._restore_progress(read_shared(checkpoint))
        if self.run_dir:
            self._restore_best(checkpoint)
            if summary := self.run_dir.summary():
                top1 = f"top-1 {summary['top1']:.2f} %"
                self.console.print(f"complete already: {top1} in {self.config.run_dir}")
            else:
                self._summarize()
            if self.best.stopped_early:
                self.console.print(
                    f"it ended early, after step {self.steps_done}: a larger --patience, or 0, "
                    "continues it"
                )
        return 0

    def _loop(self, loader: Loader) -> bool:
        """Trains until the last step (returns True) or a stop that all ranks agreed on (False)."""
        config, device = self.config, self.dist_env.device
        self.meter = Meter()  # a new one, to exclude the time of starting up
        queue = QueueLimiter(device)
        while self.steps_done < config.steps:
            wait_began = moment(device)
            batch = self._next(loader)
            wait_ended = moment(device)
            compilation.mark_step()
            metrics = train_step(self.algorithm, batch, self.steps_done, self.step)
            self.meter.add(metrics, (wait_began, wait_ended))
            queue.step()
            self.steps_done += 1
            last = self.steps_done == config.steps
            if last or self.steps_done % config.log_every == 0:
                self._log(late=not last)
            self.console.progress(self.steps_done)
            stopping = self.stop.should_stop() or self.steps_done == config.stop_at
            if last or (config.eval_every and self.steps_done % config.eval_every == 0):
                self._evaluate()
            last = last or self.best.stopped_early
            due = config.checkpoint_every and self.steps_done % config.checkpoint_every == 0
            if last or due or stopping or self.best.keeps(self.steps_done):
                self._save(loader, last=last or stopping)
            if last or stopping:
                return last
        return True

    def _log(self, *, late: bool = False) -> None:
        """Closes the present row of metrics and writes all closed rows, waiting for the device.

        `late`: on a GPU, does not wait for the newest row, whose steps may still be running.
        """
        learners = self.algorithm.learners
        if not self.meter.empty:
            rates = {f"lr/{name}": learner.lr for name, learner in learners.items()}
            skipped = {f"{IN_A_ROW}{name}": learner.skipped for name, learner in learners.items()}
            self.meter.close(self.steps_done, rates, skipped)
        for step, row in self.meter.rows(late=int(late and self.dist_env.device.type == "cuda")):
            self._write(step, row)

    def _write(self, step: int, row: Row) -> None:
        """Writes a row of metrics. Raises `NonFiniteError` if training has diverged."""
        self.train_seconds += row["train_seconds"]
        skipped = {name: row.pop(f"{IN_A_ROW}{name}") for name in self.algorithm.learners}
        for name, in_a_row in skipped.items():
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._diverged(
                    f"the last {in_a_row:.0f} updates of {_network(name)} up to step {step}"
                )
            if share := row[f"skipped/{name}"]:
                self.console.warn(
                    f"{round(share * row['steps'])} of {row['steps']} updates of {_network(name)} "
                    f"up to step {step} were skipped: their gradient was not finite"
                )
        while bad := non_finite(row):
            if not any(row[f"skipped/{name}"] for name in skipped):
                self._diverged(f"{bad} in all of the {row['steps']} steps up to {step}")
            del row[bad]  # no step of the interval had a finite value
        images = row["steps"] * self.config.images
        row["images_per_second"] = images / row["train_seconds"]
        if self.run_dir:
            self.run_dir.row(step, row)
        self.console.row(step, row)

    def _diverged(self, what: str) -> NoReturn:
        self.checkpoints.close()
        saved = self.checkpoints.saved
        kept = f"the checkpoint of step {saved} is kept" if saved > 0 else "none is kept"
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
        delay = max(self._delays().values())
        self.best.add(self.accuracy["top1"], self.steps_done, delay)
        values = {f"eval/{name}": value for name, value in self.accuracy.items()}
        if self.run_dir:
            self.run_dir.row(self.steps_done, values)
        self.console.print(f"step {self.steps_done} | evaluated: {accuracy_line(self.accuracy)}")
        if self.best.stopped_early:
            self.console.print(
                f"ends early, since the last {self.config.patience} evaluations were no better "
                f"than {self.best}"
            )

    def _save(self, loader: Loader, *, last: bool = False) -> None:
        """Writes a checkpoint, in the background unless it is the last of this session.

        Raises `CheckpointError` if two in a row, or the last, cannot be written.
        """
        self._log()  # all rows up to here, so that a stop loses none and nothing NaN is saved
        began = time.perf_counter()
        for name, learner in self.algorithm.learners.items():
            if not learner.finite():
                self._diverged(f"a weight of {_network(name)} at step {self.steps_done}")
        rank_state = rng.generator_states() | {"data": loader.state()}
        keeps = self.best.keeps(self.steps_done)

        def before() -> None:
            if self.run_dir:
                self.run_dir.sync()  # the rows of these steps

        def after(saved: Path) -> None:
            if keeps:
                self.best.keep(saved)

        self.checkpoints.save(
            self.steps_done,
            self._shared_state(),
            rank_state,
            background=not last,
            before=before,
            after=after,
        )
        self.meter.pause(time.perf_counter() - began)

    def _not_saved(self, step: int, reason: str) -> None:
        """On any rank, in the thread that writes: after a second failure the run ends."""
        self.console.warn(
            f"the checkpoint of step {step} was not written: {reason}; earlier ones are kept",
            rank=self.dist_env.rank,
        )
        if self.checkpoints.failures:
            self.stop.request()

    def _not_written(self, error: OSError) -> NoReturn:
        failure = CheckpointError(
            f"the checkpoint of step {self.steps_done} cannot be written: {error.strerror} "
            f"({error.filename or self.checkpoints.folder}); earlier ones are untouched"
        )
        failure.alone = True
        raise failure from None

    def _shared_state(self) -> State:
        """What a checkpoint holds that is equal on all ranks."""
        learners, ensemble = self.algorithm.learners, self.algorithm.eval_ensemble.learners
        return {
            "step": self.steps_done,
            "train_seconds": self.train_seconds,
            "accuracy": self.accuracy,
            **self.best.state(),
            "learners": {name: learner.state_dict() for name, learner in learners.items()},
            "eval_ensemble": [name for name, learner in learners.items() if learner in ensemble],
            "algorithm": dict(self.algorithm.state),
            "classes": [*self.manifest.classes],
        }

    def _next(self, loader: Loader) -> Batch:
        try:
            return next(loader)
        except DataError as error:
            error.alone = True  # other ranks do not read this record
            raise

    def _newest_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint, with a warning for each damaged one passed over."""
        checkpoint, damage = self.checkpoints.newest()
        for warning in damage:
            fallback = checkpoint.name if checkpoint else "none"
            self.console.warn(f"{warning}; falling back to {fallback}")
        return checkpoint

    def _resume(self, checkpoint: Path) -> dict[str, Any]:
        """Restores everything from a checkpoint; returns the data loader's state."""
        shared, rank_state = self.checkpoints.load(checkpoint)
        check_same_classes(shared, self.manifest, checkpoint)
        if "classes" not in shared:
            self.console.warn(no_class_names(checkpoint))
        restore(self.algorithm, shared, checkpoint)
        self._restore_progress(shared)
        self._restore_best(checkpoint)
        self.checkpoints.saved = self.steps_done
        rng.restore_generators(rank_state)
        self.console.print(f"resuming after step {self.steps_done} from {checkpoint}")
        data_state: dict[str, Any] = rank_state["data"]
        return data_state

    def _start(self) -> None:
        """Begins a run without a checkpoint; fine-tuning loads the weights of another run."""
        self.best.start()
        algorithm = self.config.algorithm
        if isinstance(algorithm, FinetuneConfig):
            learner = self.algorithm.learners["learner"]
            model, classes = self.config.model.name, self.manifest.classes
            message, warnings = load_start(algorithm, learner, model, classes)
            for warning in warnings:
                self.console.warn(warning)
            if warning := other_images(algorithm.start, self.config):
                self.console.warn(warning)
            self.console.print(message)

    def _restore_progress(self, shared: State) -> None:
        self.steps_done, self.train_seconds = shared["step"], shared["train_seconds"]
        self.accuracy = shared["accuracy"]
        self.best.restore(shared)

    def _restore_best(self, checkpoint: Path) -> None:
        """Restores the best checkpoint as of `checkpoint`, the newest."""
        if not self.run_dir:
            return
        try:
            warning = self.best.resume(checkpoint, self.steps_done)
        except OSError as error:
            self._not_written(error)
        if warning:
            self.console.warn(warning)

    def _introduce(self) -> None:
        """Prints what is trained on what, and warnings about it."""
        config, learners = self.config, self.algorithm.learners
        sizes = {models.count_parameters(learner.network) for learner in learners.values()}
        self.console.print(
            f"{config.recipe} on {self.dist_env.world} x {self.dist_env.device.type}: "
            f"{config.model.name}, {quantity(max(sizes))} trained parameters, "
            f"{len(self.manifest.classes)} classes, {config.labeled_batch} labeled + "
            f"{config.unlabeled_images} unlabeled images a step, {config.steps} steps, "
            f"run directory {config.run_dir}"
        )
        for note in dict.fromkeys(self.notes):  # of several networks they are equal
            self.console.print(note)
        if config.unlabeled_images and (warning := gray_views(config.data)):
            self.console.warn(warning)
        if isinstance(self.algorithm, RolePlay):
            self.console.print(
                "the first network begins as teacher, the second as student; they swap roles "
                f"every {self.algorithm.period} steps"
            )
        for what, delay in self._delays().items():
            if delay >= config.steps:
                self.console.warn(
                    f"{what} never moves: its delay of {delay} steps "
                    f"is not over in a run of {config.steps}"
                )
        random = not (config.model.pretrained or isinstance(config.algorithm, FinetuneConfig))
        if random and any(one.config.trunk_delay_steps for one in learners.values()):
            self.console.warn(
                "trunk_delay_steps trains the last layer alone on random weights: it is for "
                "--model.pretrained, or recipe finetune"
            )
        if self.chosen:
            self.console.print(self.chosen)
        if config.compile != "off" and self.steps_done < config.steps:
            self.console.print(
                "compiling during the first steps, which takes minutes, or seconds if an earlier "
                "session has filled the cache"
            )

    def _delays(self) -> dict[str, int]:
        """Steps before networks begin to move, by what they are called."""
        learners = self.algorithm.learners
        delays = {_network(n): one.config.delay_steps for n, one in learners.items()}
        delays |= {
            f"the trunk of {_network(n)}": one.config.delay_steps + one.config.trunk_delay_steps
            for n, one in learners.items()
            if one.config.trunk_delay_steps
        }
        if isinstance(self.algorithm, RolePlay):
            delays["a network as student"] = self.algorithm.config.student_delay_steps
        return delays

    def _summarize(self) -> None:
        """Writes summary.json and prints the result."""
        images_per_second = self.steps_done * self.config.images / self.train_seconds
        kept = self.best.checkpoint()
        best = f" (best {self.best}{kept and f', {kept}'})" if self.best.values else ""
        summary = {
            "recipe": self.config.recipe,
            "steps": self.steps_done,
            "stopped_early": self.best.stopped_early,
            **self.accuracy,
            **self.best.values,
            **({"best_checkpoint": kept} if kept else {}),
            "train_seconds": self.train_seconds,
            "images_per_second": images_per_second,
            "run_dir": self.config.run_dir,
        }
        if self.run_dir:
            self.run_dir.summarize(summary)
        self.console.print(
            f"done: top-1 {self.accuracy['top1']:.2f} %{best} "
            f"in {duration(self.train_seconds)} of training, "
            f"{images_per_second:.0f} images/s; {self.config.run_dir}/summary.json"
        )


def _network(learner: str) -> str:
    """A learner's name in sentences: those of role playing are numbers."""
    return f"the {learner} network" if learner in ("first", "second") else f"the {learner}"
