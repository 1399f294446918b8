"""One training run from its config to its summary: build, resume, step, log, evaluate, save."""

import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mpl_fast import distributed
from mpl_fast.algorithms.base import Metrics, Step, Teacher, train_step
from mpl_fast.algorithms.roleplay import RolePlay
from mpl_fast.batch import Batch, EvalBatches, Loader, within_classes, wrong_labels
from mpl_fast.config import FinetuneConfig, NoisyStudentConfig, RunConfig
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.distributed import DistEnv, StopFlag, seconds_waited
from mpl_fast.errors import (
    PREEMPTED,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
)
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
from mpl_fast.training.console import Console, duration
from mpl_fast.training.evaluate import accuracy_line, evaluate
from mpl_fast.training.introduction import (
    called,
    checkpoint_bytes,
    delays,
    headline,
    print_disk_space,
    warnings_of,
)
from mpl_fast.training.metrics import (
    Meter,
    QueueLimiter,
    Row,
    Spikes,
    moment,
    non_finite,
    pop_rank_seconds,
)
from mpl_fast.training.process import stop_on_signal
from mpl_fast.training.run_dir import RunDir, closing, keep_compile_cache, open_for, other_images
from mpl_fast.training.saving import State
from mpl_fast.training.step_graph import StepGraph
from mpl_fast.training.teacher import load_teacher
from mpl_fast.training.trial import check_training, memory_errors
from mpl_fast.training.watchdog import Stragglers, Watchdog

MAX_SKIPPED_IN_A_ROW = 10  # updates skipped for a non-finite gradient before the run ends
IN_A_ROW, WRONG_LABELS = "skipped_in_a_row/", "wrong_labels/"  # metrics that are in no row


def train(config: RunConfig, *later: RunConfig) -> int:
    """Trains to the end, to `stop_at` or until a signal; returns the exit code.

    The runs of `later` configs follow, each when the one before is complete. Raises `UserError` for
    what the user can correct, on every rank where it occurs.
    """
    prepared = [_prepared(one) for one in (config, *later)]
    dist_env = distributed.init(config.device, config.hang_timeout)
    for config, manifest, classes in prepared:
        check_batches(config, manifest, dist_env)
        check_training(config, classes, dist_env.world)
    code = 0
    for number, (config, manifest, classes) in enumerate(prepared):
        if number:
            compilation.release()
        run_dir = open_for(config, dist_env)
        with closing(run_dir), memory_errors(config):
            run = Run(config, dist_env, manifest, classes, run_dir)
            if not run.ended:
                _check_not_begun(later[number:], config)
            code = run.go()
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
        self.watchdog = Watchdog(Path(config.run_dir), dist_env, config.hang_timeout)
        self.stragglers = Stragglers(distributed.all_gather_object(socket.gethostname()))
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
        self.checkpoints.progressed = self.watchdog.not_idle
        self.step = self._new_step()
        self.meter, self.stop = Meter(), StopFlag()
        self.steps_done, self.train_seconds = 0, 0.0
        self.complete = False
        self.accuracy = dict[str, float]()
        self.rollbacks = 0
        self.spikes = Spikes()

    def go(self) -> int:
        """Resumes from the newest checkpoint if there is one, trains, and returns the exit code."""
        checkpoint = self.checkpoint
        if checkpoint and self.ended:
            self.complete = True
            self._already_complete(checkpoint)
            self._update_status()
            if self.run_dir:
                self.run_dir.status.end("complete")
            return 0
        data_state, began = None, None
        if checkpoint:
            data_state, began = self._resume(checkpoint)
        else:
            self._start()
        if self.run_dir:
            self.run_dir.resume_at(self.steps_done if checkpoint else -1)
            begun, ranks = "resumed" if checkpoint else "started", self.dist_env.world
            self.run_dir.event(self.steps_done, begun, ranks=ranks)
        self._update_status()
        with (
            stop_on_signal(self._request_stop),
            self.watchdog.watching(self.steps_done),
            contextlib.closing(self.checkpoints),
        ):
            self._introduce()
            self.validation = eval_loader(self.config, self.manifest, self.dist_env)
            loader = train_loader(self.config, self.manifest, self.dist_env, data_state, began)
            if not checkpoint and isinstance(self.config.algorithm, FinetuneConfig):
                self._evaluate()  # the accuracy before fine-tuning
                if self.best.keeps(self.steps_done):
                    self._save(loader)
            finished = self._train(loader)
        if finished:
            self._summarize()
            self.complete = True
            self._end("complete")
            return 0
        done = self.steps_done
        if done == self.config.stop_at:
            self._end("paused")
            self.console.print(f"paused after step {done}: the same command resumes")
            return 0
        self._end("stopped")
        self.console.print(
            f"stopped by a signal after step {done}, saved: the same command resumes"
        )
        return PREEMPTED

    def _end(self, state: str) -> None:
        self._update_status()
        if self.run_dir:
            self.run_dir.end(state)

    def _new_step(self) -> Step:
        graphs = self.config.cuda_graphs == "step"
        return StepGraph(self.algorithm).step if graphs else self.algorithm.step

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

    def _already_complete(self, checkpoint: Path) -> None:
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

    def _train(self, loader: Loader) -> bool:
        """`_loop`, again from the newest checkpoint when training diverges, if so configured."""
        while True:
            try:
                return self._loop(loader)
            except NonFiniteError as error:
                self._roll_back(error)

    def _roll_back(self, error: NonFiniteError) -> None:
        """Restores the newest checkpoint but for the position in the data; raises the error unless
        the config has rollbacks left. All ranks come here together, since they have equal rows."""
        config, checkpoint = self.config, None
        if config.on_spike == "rollback" and self.rollbacks < config.rollbacks:
            checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            raise error
        self.console.warn(str(error))
        shared, reached = read_shared(checkpoint), self.steps_done
        restore(self.algorithm, shared, checkpoint)
        self._restore_progress(shared)
        self._restore_best(checkpoint)
        self.step = self._new_step()  # a CUDA graph has the addresses of the optimizer's old state
        self.checkpoints.saved = self.steps_done
        self.rollbacks += 1
        self.console.print(
            f"rollback {self.rollbacks} of at most {config.rollbacks}: back from step {reached} to "
            f"{checkpoint}, with the images that come next"
        )
        if self.run_dir:
            self.run_dir.resume_at(self.steps_done)
            self.run_dir.event(self.steps_done, "rollback", error=str(error), reached=reached)

    def _loop(self, loader: Loader) -> bool:
        """Trains until the last step (returns True) or a stop that all ranks agreed on (False)."""
        config, device = self.config, self.dist_env.device
        self.meter = Meter()  # a new one, to exclude the time of starting up
        queue = QueueLimiter(device)
        self.watchdog.expect_long_work()
        while self.steps_done < config.steps:
            wait_began, exchanged = moment(device), seconds_waited()
            batch = self._next(loader)
            wait_ended = moment(device)
            compilation.mark_step()
            batch, wrong = self._with_valid_labels(batch)
            metrics = train_step(self.algorithm, batch, self.steps_done, self.step)
            self.meter.add(metrics | wrong, (wait_began, wait_ended), exchanged)
            queue.step()
            self.steps_done += 1
            self.watchdog.beat(self.steps_done)
            self._update_status()
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

    def _update_status(self) -> None:
        """Updates status.json."""
        if self.run_dir:
            left = self.console.seconds_left(self.steps_done)
            eta = {} if left is None else {"eta_seconds": left}
            self.run_dir.status.update(step=self.steps_done, **eta)

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
        """Writes a row of metrics. Raises `NonFiniteError` if training diverged, `DataError` for
        labels of no class."""
        self.train_seconds += row["train_seconds"]
        seconds = pop_rank_seconds(row, self.dist_env.device)
        for warning in self.stragglers.add(seconds, round(row["steps"])):
            self.console.warn(warning)
        for split in ("labeled", "unlabeled"):
            if wrong := row.pop(f"{WRONG_LABELS}{split}") * row["steps"] * self.dist_env.world:
                classes = len(self.manifest.classes)
                raise wrong_labels(wrong, split, classes, self.manifest.root)
        skipped = {name: row.pop(f"{IN_A_ROW}{name}") for name in self.algorithm.learners}
        for name, in_a_row in skipped.items():
            if in_a_row >= MAX_SKIPPED_IN_A_ROW:
                self._diverged(
                    f"not finite: the last {in_a_row:.0f} updates of {called(name)} up to step "
                    f"{step}"
                )
            if share := row[f"skipped/{name}"]:
                self.console.warn(
                    f"{round(share * row['steps'])} of {row['steps']} updates of {called(name)} "
                    f"up to step {step} were skipped: their gradient was not finite"
                )
        while bad := non_finite(row):
            if not any(row[f"skipped/{name}"] for name in skipped):
                self._diverged(f"not finite: {bad} in all of the {row['steps']} steps up to {step}")
            del row[bad]  # no step of the interval had a finite value
        factor = self.config.spike_factor if self.config.on_spike == "rollback" else 0.0
        if factor and (spike := self.spikes.add(row, factor)):
            self._diverged(f"{spike} up to step {step}")
        images = row["steps"] * self.config.images
        row["images_per_second"] = images / row["train_seconds"]
        if self.run_dir:
            self.run_dir.row(step, row)
            self.run_dir.status.update(images_per_second=row["images_per_second"])
        self.console.row(step, row)

    def _diverged(self, what: str) -> NoReturn:
        self.checkpoints.finish()  # all ranks come here, since they have equal rows
        saved = self.checkpoints.saved
        kept = f"the checkpoint of step {saved} is kept" if saved > 0 else "none is kept"
        raise NonFiniteError(
            f"{what} ({kept}): lower the learning rate, lengthen its warm-up or lower "
            "algorithm.*.max_grad_norm"
        )

    def _evaluate(self) -> None:
        self._log()
        self.watchdog.expect_long_work()
        began = time.perf_counter()
        self.accuracy = evaluate(self.algorithm, self._watched(self.validation), self.manifest)
        self.meter.pause(time.perf_counter() - began)
        delay = max(delays(self.algorithm).values())
        self.best.add(self.accuracy["top1"], self.steps_done, delay)
        values = {f"eval/{name}": value for name, value in self.accuracy.items()}
        if self.run_dir:
            self.run_dir.row(self.steps_done, values)
            self.run_dir.status.update(top1=self.accuracy["top1"])
        self.console.print(f"step {self.steps_done} | evaluated: {accuracy_line(self.accuracy)}")
        if self.best.stopped_early:
            self.console.print(
                f"ends early, since the last {self.config.patience} evaluations were no better "
                f"than {self.best}"
            )

    def _watched(self, batches: EvalBatches) -> EvalBatches:
        for batch in batches:
            self.watchdog.beat()
            yield batch

    def _save(self, loader: Loader, *, last: bool = False) -> None:
        """Writes a checkpoint, in the background unless it is the last of this session.

        Raises `CheckpointError` if two in a row, or the last, cannot be written.
        """
        self._log()  # all rows up to here, so that a stop loses none and nothing NaN is saved
        began = time.perf_counter()
        for name, learner in self.algorithm.learners.items():
            if not learner.finite():
                self._diverged(f"not finite: a weight of {called(name)} at step {self.steps_done}")
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
        seconds = time.perf_counter() - began
        if self.run_dir:
            self.run_dir.event(self.steps_done, "checkpoint", seconds=round(seconds, 3))
        self.meter.pause(seconds)

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
            "rollbacks": self.rollbacks,
            **self.best.state(),
            "learners": {name: learner.state_dict() for name, learner in learners.items()},
            "eval_ensemble": [name for name, learner in learners.items() if learner in ensemble],
            "algorithm": dict(self.algorithm.state),
            "classes": [*self.manifest.classes],
        }

    def _with_valid_labels(self, batch: Batch) -> tuple[Batch, Metrics]:
        """The batch with labels of classes only, and how many had to be changed, by split: they
        end the run when they are read, with the next row of metrics."""
        classes = len(self.manifest.classes)
        labels, wrong = within_classes(batch.labels, classes)
        truth, wrong_truth = within_classes(batch.truth, classes, lowest=-1)  # -1: none
        counts = {f"{WRONG_LABELS}labeled": wrong, f"{WRONG_LABELS}unlabeled": wrong_truth}
        return batch._replace(labels=labels, truth=truth), counts

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

    def _resume(self, checkpoint: Path) -> tuple[dict[str, Any], int | None]:
        """Restores everything from a checkpoint; returns the data loader's state and, if other
        ranks wrote it, the steps done, after which a new order of the images begins."""
        shared, rank_state, world = self.checkpoints.load(checkpoint)
        check_same_classes(shared, self.manifest, checkpoint)
        if "classes" not in shared:
            self.console.warn(no_class_names(checkpoint))
        restore(self.algorithm, shared, checkpoint)
        self._restore_progress(shared)
        self.rollbacks = shared.get("rollbacks", 0)
        self._restore_best(checkpoint)
        self.checkpoints.saved = self.steps_done
        self.console.print(f"resuming after step {self.steps_done} from {checkpoint}")
        if self.run_dir and (warning := self.run_dir.other_commit()):
            self.console.warn(warning)
        data_state: dict[str, Any] = rank_state["data"]
        if world == self.dist_env.world:
            rng.restore_generators(rank_state)
            return data_state, None
        rng.seed_step(self.config, self.dist_env, self.steps_done)
        self.console.print(
            f"it was written by {world} ranks and this run has {self.dist_env.world}: all networks "
            "and optimizers continue, the images in a new order and dropout, drawn from the seed "
            "and the step"
        )
        return data_state, self.steps_done

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
        """Prints what is trained on what, what it needs, and warnings about it."""
        config, console = self.config, self.console
        console.print(headline(config, self.algorithm, self.manifest, self.dist_env))
        size = checkpoint_bytes(self.algorithm, self._shared_state())
        print_disk_space(config, size, self.checkpoints, console)
        for note in dict.fromkeys(self.notes):  # of several networks they are equal
            console.print(note)
        if isinstance(self.algorithm, RolePlay):
            console.print(
                "the first network begins as teacher, the second as student; they swap roles "
                f"every {self.algorithm.period} steps"
            )
        for warning in warnings_of(config, self.algorithm):
            console.warn(warning)
        if self.chosen:
            console.print(self.chosen)
        if config.compile != "off" and self.steps_done < config.steps:
            console.print(
                "compiling during the first steps, which takes minutes, or seconds if an earlier "
                "session has filled the cache"
            )

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
