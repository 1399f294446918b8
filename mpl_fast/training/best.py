"""The best evaluation of a run so far, its checkpoint, and the patience with those after it."""

from pathlib import Path

from mpl_fast.config import RunConfig
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import CheckpointError
from mpl_fast.training.checkpoint import Checkpoints
from mpl_fast.training.saving import State

KINDS = {"best_top1": float, "best_step": int}


class Best:
    """Is equal on all ranks, since accuracies are. Its checkpoint is kept with `checkpoint_best`.

    That checkpoint is a hard link to one of the newest, made right after that was written. A run
    therefore never resumes from before it, except behind a damaged checkpoint.
    """

    def __init__(self, config: RunConfig, dist_env: DistEnv) -> None:
        self.values = dict[str, float]()
        """best_top1 and best_step; empty before the first evaluation."""
        self.stopped_early = False
        self._since, self._patience, self._steps = 0, config.patience, config.steps
        self._store: Checkpoints | None = None
        if config.checkpoint_best:
            folder = Path(config.run_dir) / CHECKPOINTS["best"]
            self._store = Checkpoints(folder, keep=1, rank=dist_env.rank, world=dist_env.world)

    def add(self, top1: float, step: int, delay: int) -> None:
        """Takes the evaluation after `step` steps; patience counts those after `delay` steps."""
        if top1 > self.values.get("best_top1", -1.0):
            self.values, self._since = {"best_top1": top1, "best_step": step}, 0
        elif step > delay:
            self._since += 1
        self.stopped_early = self._impatient() and step < self._steps

    def _impatient(self) -> bool:
        return 0 < self._patience <= self._since

    def state(self) -> State:
        """What a checkpoint holds of it."""
        since, early = self._since, self.stopped_early
        return {"best": self.values, "evaluations_since_best": since, "stopped_early": early}

    def restore(self, shared: State) -> None:
        """Restores `state` from a checkpoint; older versions wrote less."""
        best = shared.get("best") or {}
        self.values = {name: kind(best[name]) for name, kind in KINDS.items() if best}
        self._since = int(shared.get("evaluations_since_best", 0))
        self.stopped_early = shared.get("stopped_early", False) and self._impatient()

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is to be kept as the best."""
        return self._store is not None and self.values.get("best_step") == step

    def keep(self, saved: Path) -> None:
        """Keeps a checkpoint just saved; on the first rank, in the thread that saves.

        Raises `OSError` if it cannot be written.
        """
        if self._store:
            self._store.adopt(saved)

    def start(self) -> None:
        """Raises `CheckpointError` if a run that begins would replace the best of another."""
        if self._store and (found := self._store.all()):
            raise CheckpointError(
                f"{found[-1]} is of an earlier run, whose other checkpoints are gone: move it, or "
                "use another --run-dir"
            )

    def resume(self, resumed: Path, step: int) -> str:
        """Keeps what was the best at the checkpoint `resumed` of this step; on the first rank.

        Returns a warning if that is not there any more. Raises `CheckpointError` if it cannot be
        written.
        """
        if not self._store:
            return ""
        try:
            self._store.remove_after(step)  # of steps that are repeated
            if not self.values or self.checkpoint():
                return ""
            newest = resumed.with_name(self._store.path(int(self.values["best_step"])).name)
            if newest.exists():  # a kill came before it was kept, or the option is new
                self._store.adopt(newest)
                return ""
        except OSError as error:
            failure = CheckpointError(
                f"the checkpoint of step {step} cannot be written: {error.strerror} "
                f"({error.filename or self._store.folder}); earlier ones are untouched"
            )
            failure.alone = True
            raise failure from None
        return (
            "the checkpoint of the best evaluation so far, {best_top1:.2f} % at step {best_step}, "
            "was not kept: only one of a better evaluation will be"
        ).format(**self.values)

    def checkpoint(self) -> str:
        """The folder of the best checkpoint; empty if it is not kept."""
        if not self._store or not self.values:
            return ""
        path = self._store.path(int(self.values["best_step"]))
        return str(path) if path.exists() else ""

    def __str__(self) -> str:
        return "{best_top1:.2f} % at step {best_step}".format(**self.values)
