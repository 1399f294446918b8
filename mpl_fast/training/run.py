"""One training run from its config to its summary: build, resume, step, log, evaluate, save."""

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from mpl_fast import distributed
from mpl_fast.algorithms.base import Step, Teacher, train_step
from mpl_fast.batch import Batch, EvalBatches, Loader
from mpl_fast.config import FinetuneConfig, NoisyStudentConfig, RunConfig
from mpl_fast.config.fields import replaced
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.data.manifest import Manifest
from mpl_fast.distributed import DistEnv, StopFlag, seconds_waited
from mpl_fast.errors import PREEMPTED, DataError, NonFiniteError
from mpl_fast.learner import compilation, rng
from mpl_fast.training.auto import resolve, uses_bf16
from mpl_fast.training.best import Best
from mpl_fast.training.build import build_algorithm, eval_loader, train_loader
from mpl_fast.training.checkpoint import Checkpoints, read_shared, step_of
from mpl_fast.training.console import Console, duration
from mpl_fast.training.evaluate import accuracy_line, evaluate
from mpl_fast.training.introduction import called, delays, introduce
from mpl_fast.training.log import Log, diverged, with_valid_labels
from mpl_fast.training.metrics import Meter, QueueLimiter, moment
from mpl_fast.training.process import stop_on_signal
from mpl_fast.training.run_dir import RunDir, keep_compile_cache
from mpl_fast.training.same_config import other_images
from mpl_fast.training.saving import State
from mpl_fast.training.state import (
    check_same_classes,
    no_class_names,
    of_this_program,
    restore,
    state_of,
)
from mpl_fast.training.step_graph import StepGraph
from mpl_fast.training.teacher import load_teacher
from mpl_fast.training.trained import load_start
from mpl_fast.training.watchdog import Watchdog


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
        self.watchdog = Watchdog(
            Path(config.run_dir), dist_env, config.hang_timeout, partial(self._end, "failed")
        )
        self.checkpoints = Checkpoints(
            Path(config.run_dir) / CHECKPOINTS["newest"],
            keep=config.checkpoint_keep,
            rank=dist_env.rank,
            world=dist_env.world,
        )
        keep_compile_cache(config)
        self.checkpoint = self._newest_checkpoint()
        fresh, self.notes = self.checkpoint is None, list[str]()
        if config.precision == "auto":
            self.config = config = replaced(config, {"precision": self._precision()})
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
        self.stop = StopFlag()
        self.steps_done = 0
        self.complete = False
        self.accuracy = dict[str, float]()
        self.rollbacks = 0
        self.log = Log(
            config, dist_env, manifest, self.algorithm, self.checkpoints, self.console, run_dir
        )

    def _precision(self) -> str:
        """bf16 or fp32, equal on all ranks: that of the checkpoint, which may have been written on
        another processor, or what `auto` means where this run begins."""
        device = self.dist_env.device
        if self.checkpoint is None:
            bf16 = all(distributed.all_gather_object(uses_bf16(self.config, device)))
            return "bf16" if bf16 else "fp32"
        # Versions that did not store it had fp32 on every CPU.
        before = "bf16" if device.type == "cuda" else "fp32"
        return str(read_shared(self.checkpoint).get("precision", before))

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
            introduce(
                self.config,
                self.algorithm,
                self.manifest,
                self.dist_env,
                self.checkpoints,
                self.console,
                self.notes,
                self.chosen,
            )
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

    def _end(self, state: str, error: str = "") -> None:
        self._update_status()
        if self.run_dir:
            self.run_dir.end(state, error)

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
            with of_this_program(checkpoint):
                self.best.restore(read_shared(checkpoint))
        return step_of(checkpoint) >= self.config.steps or self.best.stopped_early

    def _already_complete(self, checkpoint: Path) -> None:
        """Prints the result; writes what a kill came before."""
        self._restore_progress(read_shared(checkpoint), checkpoint)
        if self.run_dir:
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
                self._roll_back(error, loader)

    def _roll_back(self, error: NonFiniteError, loader: Loader) -> None:
        """Restores the newest checkpoint but for the position in the data, and saves the result;
        raises the error unless the config has rollbacks left. All ranks come here together, since
        they have equal rows."""
        config, checkpoint = self.config, None
        if config.on_spike == "rollback" and self.rollbacks < config.rollbacks:
            self.watchdog.expect_long_work()
            checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            raise error
        self.console.warn(str(error))
        shared, reached, rollbacks = read_shared(checkpoint), self.steps_done, self.rollbacks + 1
        restore(self.algorithm, shared, checkpoint)
        self._restore_progress(shared, checkpoint)
        self.step = self._new_step()  # a CUDA graph has the addresses of the optimizer's old state
        self.checkpoints.saved, self.rollbacks = self.steps_done, rollbacks
        self.console.print(
            f"rollback {self.rollbacks} of at most {config.rollbacks}: back from step {reached} to "
            f"{checkpoint}, with the images that come next"
        )
        if self.run_dir:
            self.run_dir.resume_at(self.steps_done)
            self.run_dir.event(self.steps_done, "rollback", error=str(error), reached=reached)
        self.log.meter = Meter()  # without the steps that diverged
        self._save(loader)  # a kill would forget the rollback, and repeat its images

    def _loop(self, loader: Loader) -> bool:
        """Trains until the last step (returns True) or a stop that all ranks agreed on (False)."""
        config, device = self.config, self.dist_env.device
        self.log.meter = Meter()  # a new one, to exclude the time of starting up
        queue = QueueLimiter(device)
        self.watchdog.expect_long_work()
        while self.steps_done < config.steps:
            wait_began, exchanged = moment(device), seconds_waited()
            batch = self._next(loader)
            wait_ended = moment(device)
            compilation.mark_step()
            batch, wrong = with_valid_labels(batch, len(self.manifest.classes))
            metrics = train_step(self.algorithm, batch, self.steps_done, self.step)
            self.log.meter.add(metrics | wrong, (wait_began, wait_ended), exchanged)
            queue.step()
            self.steps_done += 1
            self.watchdog.beat(self.steps_done)
            self._update_status()
            last = self.steps_done == config.steps
            if last or self.steps_done % config.log_every == 0:
                self.log.close(self.steps_done, late=not last)
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

    def _evaluate(self) -> None:
        self.log.close(self.steps_done)
        self.watchdog.expect_long_work()
        began = time.perf_counter()
        self.accuracy = evaluate(self.algorithm, self._watched(self.validation), self.manifest)
        self.log.meter.pause(time.perf_counter() - began)
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
        # All rows up to here, so that a stop loses none and nothing NaN is saved.
        self.log.close(self.steps_done)
        began = time.perf_counter()
        for name, learner in self.algorithm.learners.items():
            if not learner.finite():
                what = f"not finite: a weight of {called(name)} at step {self.steps_done}"
                raise diverged(what, self.checkpoints)
        self.checkpoints.save(
            self.steps_done,
            self._shared_state(),
            rng.generator_states() | {"data": loader.state()},
            background=not last,
            before=self.run_dir.sync if self.run_dir else None,  # the rows of these steps
            after=self.best.keep if self.best.keeps(self.steps_done) else None,
        )
        seconds = time.perf_counter() - began
        if self.run_dir:
            self.run_dir.event(self.steps_done, "checkpoint", seconds=round(seconds, 3))
        self.log.meter.pause(seconds)

    def _not_saved(self, step: int, reason: str) -> None:
        """On any rank, in the thread that writes: after a second failure the run ends."""
        self.console.warn(
            f"the checkpoint of step {step} was not written: {reason}; earlier ones are kept",
            rank=self.dist_env.rank,
        )
        if self.checkpoints.failures:
            self.stop.request()

    def _shared_state(self) -> State:
        """What a checkpoint holds that is equal on all ranks."""
        return {
            "step": self.steps_done,
            "train_seconds": self.log.train_seconds,
            "accuracy": self.accuracy,
            "rollbacks": self.rollbacks,
            "precision": self.config.precision,
            **self.best.state(),
            **state_of(self.algorithm),
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

    def _resume(self, checkpoint: Path) -> tuple[dict[str, Any], int | None]:
        """Restores everything from a checkpoint; returns the data loader's state and, if other
        ranks wrote it, the steps done, after which a new order of the images begins."""
        shared, rank_state, world = self.checkpoints.load(checkpoint)
        check_same_classes(shared, self.manifest, checkpoint)
        if "classes" not in shared:
            self.console.warn(no_class_names(checkpoint))
        restore(self.algorithm, shared, checkpoint)
        self._restore_progress(shared, checkpoint)
        with of_this_program(checkpoint):
            data_state = dict[str, Any](rank_state["data"])
            if world == self.dist_env.world:
                rng.restore_generators(rank_state)
        self.checkpoints.saved = self.steps_done
        self.console.print(f"resuming after step {self.steps_done} from {checkpoint}")
        if self.run_dir and (warning := self.run_dir.other_commit):
            self.console.warn(warning)
        if world == self.dist_env.world:
            return data_state, None
        rng.seed_step(self.config, self.dist_env, self.steps_done)
        self.console.print(
            f"ranks: {world} when it was written, now {self.dist_env.world}: all networks and "
            "optimizers continue, the images in a new order and dropout, drawn from the seed and "
            "the step"
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

    def _restore_progress(self, shared: State, checkpoint: Path) -> None:
        """Restores how far the run was, and its best checkpoint as of `checkpoint`, the newest."""
        with of_this_program(checkpoint):
            self.steps_done = int(shared["step"])
            self.log.train_seconds = float(shared["train_seconds"])
            self.accuracy = dict(shared["accuracy"])
            self.rollbacks = int(shared.get("rollbacks", 0))
            self.best.restore(shared)
        if self.run_dir and (warning := self.best.resume(checkpoint, self.steps_done)):
            self.console.warn(warning)

    def _summarize(self) -> None:
        """Writes summary.json and prints the result."""
        images_per_second = self.steps_done * self.config.images / self.log.train_seconds
        kept = self.best.checkpoint()
        best = f" (best {self.best}{kept and f', {kept}'})" if self.best.values else ""
        summary = {
            "recipe": self.config.recipe,
            "steps": self.steps_done,
            "stopped_early": self.best.stopped_early,
            **self.accuracy,
            **self.best.values,
            **({"best_checkpoint": kept} if kept else {}),
            "train_seconds": self.log.train_seconds,
            "images_per_second": images_per_second,
            "run_dir": self.config.run_dir,
        }
        if self.run_dir:
            self.run_dir.summarize(summary)
        self.console.print(
            f"done: top-1 {self.accuracy['top1']:.2f} %{best} "
            f"in {duration(self.log.train_seconds)} of training, "
            f"{images_per_second:.0f} images/s; {self.config.run_dir}/summary.json"
        )
