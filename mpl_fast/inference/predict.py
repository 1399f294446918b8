"""Predictions of a trained network for images of any kind, as a file.

The images are divided into parts. Each is predicted by one rank and written to the folder
OUT.parts; when all are there, they are joined in the order of the images. So a stopped command
continues with the parts that are missing, on any number of ranks.
"""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpl_fast import distributed
from mpl_fast.atomic import atomic_path
from mpl_fast.config.run import WhichCheckpoint
from mpl_fast.data.stream import dali_gpu
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors, printable
from mpl_fast.first_few import counted, first_few
from mpl_fast.inference.decoding import Decoder, Files, read_files
from mpl_fast.inference.images import Images, open_images
from mpl_fast.inference.parts import Parts
from mpl_fast.inference.tables import Part, write_labels, writer_of
from mpl_fast.inference.trained import VIEW, Trained, load
from mpl_fast.packing.write.pixels import PIXEL_LIMIT
from mpl_fast.packing.write.progress import Progress
from mpl_fast.training.metrics import QueueLimiter

PART = {"cuda": 8192, "cpu": 1024}  # images, about; a stop loses at most one part of each rank
UNEVEN = 3  # times as many images kept of a class as of another are a warning
# Of the command: what makes the rows, besides the network and its input.
PREDICTED = ("top_k", "logits", "features", "on_bad", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `tools/predict.py`, whose help describes them."""

    run: Path
    images: str
    out: Path
    top_k: int = 5
    logits: bool = False
    features: bool = False
    keep: float | None = None
    keep_per_class: int | None = None
    on_bad: Literal["skip", "convert"] = "skip"
    max_pixels: int = PIXEL_LIMIT
    checkpoint: WhichCheckpoint = "newest"
    force: bool = False
    pipeline: Sequence[str] = ()
    """Options of train.py in place of the run's."""

    @property
    def kept(self) -> Path:
        """The labels file that `keep` writes."""
        return self.out.with_suffix(".kept.csv")

    @property
    def parts(self) -> Path:
        """The folder of what is predicted so far."""
        return self.out.with_name(f"{self.out.name}.parts")


def predict(options: PredictOptions) -> None:
    """Predicts all images and writes `options.out`; prints counts, throughput and accuracy.

    Under torchrun each image is predicted by one rank; all need the folder of `options.out`. Raises
    `UserError`, also if no image at all can be decoded.
    """
    _check(options)
    trained = load(options.run, checkpoint=options.checkpoint, pipeline=options.pipeline)
    _say(*_above_targets(options.keep, trained))
    with Parts(options.parts, lock=trained.config.lock) as parts:
        images = _list(options.images, options.parts)
        _say(*(f"warning: {line}" for line in (*trained.warnings, *images.warnings)))
        world, total = distributed.world_size(), len(images.names)
        batch = max(1, trained.config.eval_batch // world)
        share = -(-total // (batch * world))  # of a rank, in batches
        missing = parts.open(
            _identity(options, trained, images),
            total,
            batch=batch,
            part=batch * max(1, min(PART[trained.device.type] // batch, share)),
            anew=options.force,
        )
        new, seconds = _Network(options, trained, images, parts).run(missing)
        if distributed.rank() == 0:
            _join(options, trained, images, parts, f"{new / max(seconds, 1e-9):.0f} images/s")
    distributed.shutdown()


def _check(options: PredictOptions) -> None:
    writer_of(options.out, vectors=options.logits or options.features)
    if options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k}: must be at least 1")
    if options.keep is not None and not 0 < options.keep <= 1:
        raise ConfigError(f"--keep {options.keep}: must be a probability, above 0 and at most 1")
    if options.keep_per_class is not None:
        if options.keep is None:
            raise ConfigError("--keep-per-class is for --keep P, the least probability of them")
        if options.keep_per_class < 1:
            raise ConfigError(f"--keep-per-class {options.keep_per_class}: must be at least 1")
    if not 1 <= options.max_pixels <= PIXEL_LIMIT:
        raise ConfigError(f"--max-pixels {options.max_pixels}: must be 1 to {PIXEL_LIMIT}")
    if not options.out.absolute().parent.is_dir():
        raise OutputError(f"--out {options.out}: there is no folder {options.out.parent}")
    for file in (options.out, *([options.kept] if options.keep else [])):
        if file.is_dir():
            raise OutputError(f"{file} is a folder: give another --out")
        begun = file == options.kept and options.parts.exists()  # perhaps by a stopped command
        if file.exists() and not (options.force or begun):
            raise _taken(file)


def _above_targets(keep: float | None, trained: Trained) -> Iterator[str]:
    """A warning if the targets of training were below `keep`, which few probabilities pass then."""
    smoothing: float = getattr(trained.config.algorithm, "label_smoothing", 0.0)
    target = 1.0 - smoothing + smoothing / len(trained.classes)
    if keep is not None and keep > target:
        yield (
            f"warning: --keep {keep:g}: the network was trained with label_smoothing "
            f"{smoothing:g}, towards probabilities of {target:.3f}, which few exceed: lower --keep"
        )


def _taken(file: Path) -> OutputError:
    return OutputError(f"{file} exists: give another --out, or --force to replace it")


def _list(spec: str, folder: Path) -> Images:
    """Lists the images on every rank, first on rank 0, which unpacks archives."""
    if distributed.rank() > 0:
        distributed.barrier()
    images = open_images(spec, folder, _say)
    if distributed.rank() == 0:
        distributed.barrier()
    if len(set(distributed.all_gather_object(images.content))) > 1:
        raise DataError(f"{spec}: not the same images on all ranks: they change, or disks differ")
    return images


def _say(*lines: str) -> None:
    if distributed.rank() == 0:
        for line in lines:
            print(f"predict: {printable(line)}", file=sys.stderr, flush=True)


def _identity(options: PredictOptions, trained: Trained, images: Images) -> dict[str, Any]:
    """What a prediction is of, by the word for it in messages."""
    data = trained.config.data
    checkpoint = (trained.checkpoint / "checkpoint.json").read_bytes()
    return {
        "checkpoint": hashlib.sha256(checkpoint).hexdigest(),
        "images": images.content,
        "options": {
            **{name: getattr(options, name) for name in PREDICTED},
            **{f"data.{name}": getattr(data, name) for name in VIEW},
            "data.device": "cpu" if dali_gpu(data, trained.device) is None else "gpu",
            "precision": str(trained.dtype),
        },
    }


class _Network:
    """Predicts parts."""

    def __init__(
        self, options: PredictOptions, trained: Trained, images: Images, parts: Parts
    ) -> None:
        self._options, self._trained, self._images = options, trained, images
        self._parts = parts

    def run(self, missing: Sequence[int]) -> tuple[int, float]:
        """Predicts parts, each on one rank; returns the number of images, and seconds."""
        world, done = distributed.world_size(), 0
        new = sum(len(self._parts.places(number)) for number in missing)
        if before := len(self._images.names) - new:
            _say(f"{counted(before, 'image was', 'images were')} predicted before")
        began = time.perf_counter()
        stream = sys.stderr if distributed.rank() == 0 else None
        with Progress("predicted", new, 0, stream) as progress:
            mine = self._predict(
                missing[distributed.rank() :: world],
                lambda images: progress.update(min(done + world * images, new)),
            )
            for _ in range(-(-len(missing) // world)):
                # Ranks wait for each other here, so none waits for long at the end.
                done += int(distributed.sum_over_ranks(torch.tensor(next(mine, 0))))
        return new, time.perf_counter() - began

    def _predict(self, numbers: Sequence[int], progress: Callable[[int], None]) -> Iterator[int]:
        """Predicts and writes parts, and yields the number of images of each; `progress` is called
        with those done of a part."""
        parts, trained = self._parts, self._trained
        convert = self._options.on_bad == "convert"
        batches = (places for number in numbers for places in parts.batches(number))
        decoder = Decoder(
            trained.config.data,
            batch=parts.batch,
            device=trained.device,
            dtype=trained.dtype,
            convert=convert,
        )
        files_of = partial(read_files, convert=convert, max_pixels=self._options.max_pixels)
        views = decoder.views(files_of(batches, self._images.read))
        queue = QueueLimiter(trained.device)
        for number in numbers:
            places = parts.places(number)
            found: list[Files] = []
            values: list[list[Tensor]] = []
            for batch in parts.batches(number):
                files, images = next(views)
                found.append(Files(dict.fromkeys(files.images, b""), files.faults))
                if images is not None:
                    values.append(self._values(images))
                queue.step()
                progress(batch.stop - places.start)
            columns = [torch.cat(column).cpu().numpy() for column in zip(*values, strict=True)]
            good = [place for files in found for place in files.images]
            faults = {place: fault for files in found for place, fault in files.faults.items()}
            parts.write(number, good, columns, faults)
            yield len(places)

    def _values(self, images: Tensor) -> list[Tensor]:
        return values_of(self._trained, images, self._options)


def values_of(trained: Trained, images: Tensor, options: PredictOptions) -> list[Tensor]:
    """(N, k) labels and probabilities, and if asked for (N, C) logits and (N, F) features."""
    features: list[Tensor] = []
    if options.features:
        logits, *features = trained.logits_and_features(images)
    else:
        logits = trained.logits(images)
    top = logits.softmax(-1).topk(min(options.top_k, logits.shape[1]))
    return [top.indices, top.values, *([logits] if options.logits else []), *features]


def _join(
    options: PredictOptions, trained: Trained, images: Images, parts: Parts, speed: str
) -> None:
    """Writes the files, and prints the last lines."""
    summary = _Summary(options, trained.classes, images)
    blank = torch.zeros(1, 3, *[trained.config.data.image_size] * 2, dtype=trained.dtype)
    one_row = [value.cpu().numpy() for value in values_of(trained, blank, options)]
    write = writer_of(options.out, vectors=options.logits or options.features)
    with output_errors(options.out):
        with atomic_path(options.out) as temporary:
            rows = (summary.add(part) for part in _rows(options, images, parts, one_row))
            write(temporary, rows, trained.classes)
            if options.keep is not None:  # before the other file, which completes the command
                with atomic_path(options.kept) as labels:
                    write_labels(labels, {**images.labels, **summary.kept}, images.names)
                    old = options.kept.read_bytes() if options.kept.exists() else None
                    if not options.force and old not in (None, labels.read_bytes()):
                        raise _taken(options.kept)
        parts.remove()
    _say(*summary.warnings())
    total = len(images.names)
    if len(summary.bad) == total:
        raise DataError(f"{options.images}: no image can be decoded: {options.out} has the reasons")
    whole = f"{options.out}: {counted(total, 'image')}, {len(summary.bad)} of them bad; {speed}"
    for line in (whole, *summary.lines()):
        print(printable(line))


def _rows(
    options: PredictOptions, images: Images, parts: Parts, one_row: Sequence[NDArray[Any]]
) -> Iterator[Part]:
    """All parts with a row for each image, in arrays like those of `one_row`."""
    for places, good, faults, values in parts:
        whole = [np.zeros((len(places), one.shape[1]), one.dtype) for one in one_row]
        for array, value in zip(whole, values, strict=False):  # no value where no image is good
            array[good - places.start] = value
        labels, probabilities, *vectors = whole
        yield Part(
            images.names[places.start : places.stop],
            labels,
            probabilities,
            vectors.pop(0) if options.logits else None,
            vectors.pop(0) if options.features else None,
            {int(place) - places.start: fault for place, fault in faults.items()},
        )


class _Summary:
    """What is printed of the rows, and which are kept."""

    def __init__(self, options: PredictOptions, classes: Sequence[str], images: Images) -> None:
        self._options, self._classes, self._images = options, classes, images
        self._labels = {name: label for label, name in enumerate(classes)}
        self._place = self._correct = self._known = 0
        self._sure: list[list[tuple[float, str]]] = [[] for _ in classes]
        self.bad: list[str] = []

    @property
    def kept(self) -> dict[str, str]:
        """Classes of the images that are kept: of each class the most probable ones."""
        most = self._options.keep_per_class
        return {
            name: label
            for label, sure in zip(self._classes, self._sure, strict=True)
            for _, name in sorted(sure, reverse=True)[:most]
        }

    def add(self, part: Part) -> Part:
        """Counts the next part, and returns it."""
        for row, name in enumerate(part.names):
            known = self._labels.get(self._images.known[self._place])
            self._place += 1
            if row in part.errors:
                self.bad.append(f"{name}: {part.errors[row]}")
                continue
            label, probability = int(part.labels[row, 0]), part.probabilities[row, 0]
            if known is not None:
                self._known += 1
                self._correct += known == label
            keep = self._options.keep
            if keep is not None and probability >= keep and name not in self._images.labeled:
                self._sure[label].append((float(probability), name))
        return part

    def warnings(self) -> Iterator[str]:
        """Bad images, classes of which none is kept, and classes of very different sizes."""
        options = self._options
        if self.bad:
            what = counted(len(self.bad), "bad image has", "bad images have")
            yield f"warning: {what} no prediction but an error in {options.out}:"
            yield from first_few(map(printable, self.bad), between="\n").split("\n")
        if options.keep is None:
            return
        sizes = Counter(self.kept.values())
        if without := [name for name in self._classes if not sizes[name]]:
            what = counted(len(without), "class has", "classes have")
            yield f"warning: {what} no image with a probability of {options.keep}: " + first_few(
                without
            )
        (most, largest), *_ = sizes.most_common(1) or [("", 0)]
        least = min(self._classes, key=lambda name: sizes[name])
        if largest > UNEVEN * max(sizes[least], 1):
            yield (
                f"warning: {largest} images of {most} are kept and {sizes[least]} of {least}: a "
                "network that is trained on such labels prefers the large classes; "
                "--keep-per-class with a lower --keep evens them out"
            )

    def lines(self) -> Iterator[str]:
        """The kept images by class, and the accuracy."""
        options, kept = self._options, self.kept
        if options.keep is not None:
            counts = Counter(kept.values())
            by_class = first_few((f"{name}: {counts[name]}" for name in self._classes), 20)
            beside = f" beside {len(own)} labeled ones" if (own := self._images.labels) else ""
            yield f"{options.kept}: {len(kept)} kept{beside} ({by_class})"
        if self._known:
            share = 100 * self._correct / self._known
            yield f"top-1 {share:.2f} % of {counted(self._known, 'image')} with a known label"
