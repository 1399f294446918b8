"""Accuracy on the validation split: every image counts exactly once, on any number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpl_fast import distributed
from mpl_fast.algorithms.base import Algorithm, predict
from mpl_fast.batch import EvalBatches, within_classes, wrong_labels
from mpl_fast.config import RunConfig
from mpl_fast.config.run import WhichCheckpoint
from mpl_fast.data.class_names import lacking, positions
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.first_few import first_few
from mpl_fast.learner import compilation, rng
from mpl_fast.training.auto import evaluated_in, plain
from mpl_fast.training.build import build_algorithm, count_classes, eval_loader, resolve_epochs
from mpl_fast.training.console import Console
from mpl_fast.training.metrics import QueueLimiter
from mpl_fast.training.run_dir import keep_compile_cache
from mpl_fast.training.state import no_class_names, restore
from mpl_fast.training.trained import read_checkpoint
from mpl_fast.training.trial import check_evaluation

Accuracy = dict[str, float]
ViewCount = Literal[1, 2, 6]


@torch.no_grad()
def evaluate(
    algorithm: Algorithm, batches: EvalBatches, manifest: Manifest, views: ViewCount = 1
) -> Accuracy:
    """Evaluates the averaged weights of `algorithm.eval_ensemble` on the split val.

    Returns top1 and top5 in percent and count, the number of images over all ranks; with `views`
    above 1 also top1_views and top5_views, those of the mean prediction over the views of an image.
    Raises `DataError` if the ranks together did not see every image once, or labels are of no
    class.
    """
    hits: Tensor | None = None
    queue: QueueLimiter | None = None
    for images, labels, count in batches:
        compilation.mark_step()
        mean = one = predict(algorithm, images)
        if views > 1:
            mean = one / views
            for view in other_views(images, views):
                mean = mean + predict(algorithm, view) / views
        found = [_hits(p[:count], labels[:count]) for p in (one, mean)]
        batch_hits = torch.cat([found[0], found[1][:2]])
        hits = batch_hits if hits is None else hits + batch_hits
        queue = queue or QueueLimiter(images.device)
        queue.step()
    if hits is None:
        raise DataError("the validation split gave no image")
    totals = [int(x) for x in distributed.sum_over_ranks(hits).tolist()]
    top1, top5, count, wrong, *of_views = totals
    expected = manifest.splits["val"].records
    if wrong:
        raise wrong_labels(wrong, "val", len(manifest.classes), manifest.root)
    if count != expected:
        raise DataError(f"validation saw {count} images, the manifest lists {expected}: pack again")
    accuracy = {"top1": 100.0 * top1 / count, "top5": 100.0 * top5 / count, "count": count}
    if views > 1:
        shares = (100.0 * right / count for right in of_views)
        accuracy |= zip(("top1_views", "top5_views"), shares, strict=True)
    return accuracy


def other_views(images: Tensor, views: ViewCount) -> Iterator[Tensor]:
    """The views of images ``(N, 3, H, W)`` besides themselves: mirrored (2), and both of them
    shifted by a pixel to the lower right and to the upper left, borders reflected (6; the two
    shifts of airbench, arXiv 2404.00498, whose weights are half of these)."""
    mirrored = images.flip(-1)
    yield mirrored
    if views == 6:
        height, width = images.shape[-2:]
        for view in (images, mirrored):
            padded = F.pad(view, (1, 1, 1, 1), "reflect")
            for start in (0, 2):
                yield padded[..., start : start + height, start : start + width]


def evaluate_run(
    config: RunConfig, which: WhichCheckpoint = "newest", views: ViewCount = 1
) -> Accuracy:
    """Evaluates the newest or the best checkpoint of `config.run_dir` and prints one line, or two
    with `views` above 1.

    Labels are those of the run's classes, by name. Raises `UserError` as training does, and
    `CheckpointError` if no checkpoint is usable.
    """
    if views > 1 and not config.data.flip:
        raise ConfigError(
            "--views above 1 mirrors images, which data.flip false says changes their class: "
            "leave out --views"
        )
    manifest = read_manifest(config.data.root)
    config = plain(resolve_epochs(config, manifest))
    check_evaluation(config, len(manifest.classes))
    dist_env = distributed.init(config.device)
    console = Console(config.steps, silent=not dist_env.is_rank0)
    checkpoint, shared, warnings = read_checkpoint(config.run_dir, which)
    for warning in warnings:
        console.warn(warning)
    classes = count_classes(config, manifest, shared.get("classes"))
    labels = _labels(shared.get("classes"), manifest, checkpoint, console)
    config = evaluated_in(config, shared, dist_env.device)
    algorithm = build_algorithm(config, manifest, classes, dist_env.device, fresh=False)
    keep_compile_cache(config)
    rng.seed_run(config, dist_env)
    restore(algorithm, shared, checkpoint)
    batches = eval_loader(config, manifest, dist_env)
    if labels is not None:
        batches = _relabeled(batches, labels.to(dist_env.device))
    accuracy = evaluate(algorithm, batches, manifest, views)
    console.print(f"{checkpoint}: {accuracy_line(accuracy)}")
    if views > 1:
        line = "top-1 {top1_views:.2f} %, top-5 {top5_views:.2f} %".format(**accuracy)
        console.print(f"{checkpoint}: {line} by the mean of {views} views of each image")
    distributed.shutdown()
    return accuracy


def _labels(
    trained: list[str] | None, manifest: Manifest, checkpoint: Path, console: Console
) -> Tensor | None:
    """The network's label for each of the data's, (C,) int64 on the CPU; None if they are equal.

    Prints how they were mapped. Raises `DataError` for classes that the network does not have.
    """
    names = [*manifest.classes]
    if trained is None:
        console.warn(no_class_names(checkpoint))
    if trained is None or trained == names:
        return None
    if unknown := lacking(names, trained):
        raise DataError(
            f"{manifest.root}: {len(unknown)} of its {len(names)} classes "
            f"({first_few(unknown, 3)}) are not among the {len(trained)} that {checkpoint} was "
            "trained on: "
            "evaluate on data whose classes have the names of the run's"
        )
    what = "the network's classes in another order: labels are mapped by name"
    if len(names) < len(trained):
        what = f"{len(names)} of the network's {len(trained)} classes: labels are mapped by name, "
        what += f"guesses are among all {len(trained)}"
    console.print(f"{manifest.root} has {what}")
    return torch.tensor(positions(names, trained))


def _relabeled(batches: EvalBatches, labels: Tensor) -> EvalBatches:
    for images, given, count in batches:
        valid, _ = within_classes(given, len(labels))
        yield images, torch.where(valid == given, labels[valid], -1), count


def accuracy_line(accuracy: Accuracy) -> str:
    """The result of `evaluate` as text."""
    return "top-1 {top1:.2f} %, top-5 {top5:.2f} % of {count:.0f} images".format(**accuracy)


def _hits(probabilities: Tensor, labels: Tensor) -> Tensor:
    """``(4,)`` int64 on the device: rows correct at the first guess, within five, all rows, and
    those whose label is of no class."""
    guesses = probabilities.topk(min(5, probabilities.shape[1]), dim=1).indices
    correct = guesses == labels[:, None]
    rows = torch.full((), len(labels), device=labels.device)
    _, wrong = within_classes(labels, probabilities.shape[1])
    return torch.stack([correct[:, 0].sum(), correct.sum(), rows, wrong])
