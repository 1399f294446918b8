"""The fixed teacher of recipe noisy_student: the networks of another run, copied into this one.

The copy is a run directory, RUN/checkpoints/teacher, with the other run's config.yaml and the
checkpoint that was its newest. A resumed run reads nothing else, so it may move, or train on.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast import atomic
from mpl_fast.algorithms.noisy_student import FIXED
from mpl_fast.config import NoisyStudentConfig, RunConfig
from mpl_fast.config.command_line import parse
from mpl_fast.config.fields import replaced
from mpl_fast.distributed import broadcast_object, rank
from mpl_fast.errors import CheckpointError
from mpl_fast.learner import Learner
from mpl_fast.training.auto import uses_bf16
from mpl_fast.training.build import build_network
from mpl_fast.training.checkpoint import step_of
from mpl_fast.training.trained import find_checkpoint, load_trained, read_trained

OPTION = "algorithm.teacher"


class FixedTeacher:
    """Labels images of this run with networks that were trained on those of another."""

    def __init__(self, members: Sequence[Learner], ours: RunConfig, theirs: RunConfig) -> None:
        self._members, self._mean_of = members, getattr(theirs.algorithm, "ensemble", "probability")
        self._side = theirs.data.image_size
        self._scale: Tensor | None = None
        if ours.data.mean != theirs.data.mean or ours.data.std != theirs.data.std:
            (mean, std), (their_mean, their_std) = (
                (
                    torch.tensor(x, device=members[0].device).view(1, 3, 1, 1)
                    for x in (d.mean, d.std)
                )
                for d in (ours.data, theirs.data)
            )
            self._scale, self._shift = std / their_std, (mean - their_mean) / their_std

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)`` whose softmax is what the other run would evaluate, of images
        ``(N, 3, H, W)`` as this run sizes and normalizes them."""
        if images.shape[-1] != self._side:
            images = F.interpolate(
                images.float(), size=(self._side, self._side), mode="bilinear", antialias=True
            )
        if self._scale is not None:
            images = images * self._scale + self._shift
        logits = [member.infer(images) for member in self._members]
        if len(logits) == 1:
            return logits[0]
        stacked = torch.stack(logits).float()
        if self._mean_of == "logits":
            return stacked.mean(0)
        return stacked.log_softmax(-1).logsumexp(0)


class LoadedTeacher(NamedTuple):
    """A teacher, and what to print about it."""

    teacher: FixedTeacher
    message: str
    warnings: list[str]


def load_teacher(
    config: RunConfig,
    algorithm: NoisyStudentConfig,
    classes: Sequence[str],
    device: torch.device,
    *,
    fresh: bool,
) -> LoadedTeacher:
    """The teacher of a resolved config, its outputs in the order of `classes`; the same for every
    rank.

    `fresh`: the run has no checkpoint, so the teacher is copied from the run that the option names.
    A collective. Raises `UserError` for a run that cannot be the teacher.
    """
    copy = Path(config.run_dir) / "checkpoints" / "teacher"
    warnings = _copy_run(algorithm.teacher, copy) if fresh else []
    if not (copy / "config.yaml").exists():
        raise CheckpointError(
            f"{copy} is gone, the copy of the teacher that this run began with: start again in "
            "another --run-dir"
        )
    theirs = parse(["--config", str(copy / "config.yaml")], for_training=False)
    theirs = replaced(theirs, {"model.frozen": False})
    found = read_trained(OPTION, str(copy), theirs.model.name, classes)
    assert config.compile != "auto" != config.cuda_graphs
    members = []
    for name in found.weights:
        network = build_network(theirs, len(classes))
        load_trained(found, name, network)
        member = Learner(
            network,
            FIXED,
            steps=1,
            device=device,
            bf16=uses_bf16(config, device),
            compiled=config.compile,
            graphs=config.cuda_graphs,
        )
        members.append(member)
    kinds = " and ".join(f"the {kind} of {name}" for name, (kind, _) in found.weights.items())
    message = (
        f"the teacher is {theirs.model.name}, {kinds} of {algorithm.teacher} after step "
        f"{step_of(found.checkpoint)}{found.about}{_other_images(config, theirs)}"
    )
    return LoadedTeacher(FixedTeacher(members, config, theirs), message, warnings + found.warnings)


def _copy_run(run: str, to: Path) -> list[str]:
    """Copies config and newest checkpoint of a run; returns warnings about damaged ones."""
    checkpoint, warnings = find_checkpoint(run, option=OPTION)
    failure = None
    if rank() == 0:
        partial = to.with_name(".writing_teacher")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            folder = partial / "checkpoints" / checkpoint.name
            folder.mkdir(parents=True)
            files = {partial / "config.yaml": Path(run) / "config.yaml"}
            files |= {folder / file.name: file for file in checkpoint.iterdir()}
            for made, file in files.items():
                with atomic.atomic_path(made) as temporary:
                    shutil.copyfile(file, temporary)
            shutil.rmtree(to, ignore_errors=True)
            partial.rename(to)
            atomic.sync_folder(to.parent)
        except OSError as error:
            failure = CheckpointError(
                f"{OPTION}: {run} cannot be copied to {to}: {error.filename}: {error.strerror}"
            )
    if failure := broadcast_object(failure):
        raise failure
    return warnings


def _other_images(ours: RunConfig, theirs: RunConfig) -> str:
    """How images are adapted to the teacher, as the end of a message."""
    side = theirs.data.image_size
    resized = f"weak views are resized to its {side} pixels" if side != ours.data.image_size else ""
    other = ours.data.mean != theirs.data.mean or ours.data.std != theirs.data.std
    normalized = "normalized by its mean and std" if other else ""
    ways = " and ".join(filter(None, (resized, normalized)))
    return ways and f"; for it {ways}"
