"""Predictions of a run's network on a split, computed in one pass and cached in the run.

Of an image only its five best classes and three numbers are kept, so that 50,000 images of 1,000
classes take 3 MB; features are kept of the images that a map of them shows.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpl_fast.atomic import atomic_file
from mpl_fast.batch import within_classes, wrong_labels
from mpl_fast.data.class_names import lacking, positions
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.data.records import NO_LABEL
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import CheckpointError, DataError
from mpl_fast.first_few import first_few
from mpl_fast.inference.trained import VIEW, Trained, config_of, load
from mpl_fast.report.measures import Floats, Ints
from mpl_fast.training.build import eval_loader
from mpl_fast.training.checkpoint import step_of
from mpl_fast.training.console import duration
from mpl_fast.training.trained import find_checkpoint
from mpl_fast.untrusted import json_value, npz_arrays

FORMAT = 1  # of cached files; to be increased when their content changes
CACHE = "report_cache"
GUESSES = 5
SECONDS = 5.0  # between two lines of progress
Say = Callable[[str], None]
Arrays = dict[str, Any]  # of NumPy


@dataclass(frozen=True)
class Predictions:
    """Of the first N images of a split; labels are the network's."""

    labels: Ints  # (N,) int32, -1: unknown
    guesses: Ints  # (N, 5) int32, best first; fewer columns with fewer classes
    probabilities: Floats  # (N, 5) float32, theirs
    nll: Floats  # (N,) float32, negative log-likelihood of the label; NaN: unknown
    squares: Floats  # (N,) float32, sum of squared probabilities
    places: Ints  # (M,) int64, images that have features
    features: Floats  # (M, F) float16

    @property
    def known(self) -> NDArray[np.bool_]:
        """``(N,)``: the images that have a label."""
        return self.labels >= 0

    @property
    def hits(self) -> NDArray[np.bool_]:
        """``(N,)``: the label is the best guess."""
        found: NDArray[np.bool_] = self.best == self.labels
        return found

    @property
    def top5(self) -> NDArray[np.bool_]:
        """``(N,)``: the label is among the five best."""
        found: NDArray[np.bool_] = (self.guesses == self.labels[:, None]).any(1)
        return found

    @property
    def best(self) -> Ints:
        """``(N,)``: the best guess."""
        return self.guesses[:, 0]

    @property
    def confidence(self) -> Floats:
        """``(N,)``: probability of the best guess."""
        return self.probabilities[:, 0]

    @property
    def brier(self) -> float:
        """Mean over labeled images of the squared distance of probabilities and one-hot label."""
        known = self.known
        return float((self.squares[known] - 2 * np.exp(-self.nll[known]) + 1).mean())


class Network:
    """The network of a run's newest checkpoint and the run's records, each read when needed.

    `options` are options of train.py that replace the run's. Raises `ConfigError` for a wrong one
    and `CheckpointError` without a usable checkpoint.
    """

    def __init__(self, run: Path, options: Sequence[str], say: Say) -> None:
        self.run, self.options, self.say = run, options, say
        self.config = config_of(run, options)
        self.checkpoint, self.warnings = find_checkpoint(run)

    @property
    def step(self) -> int:
        """Training steps of the checkpoint."""
        return step_of(self.checkpoint)

    @cached_property
    def manifest(self) -> Manifest:
        """Of the records. Raises `DataError` if they are gone or damaged."""
        return read_manifest(self.config.data.root)

    @cached_property
    def trained(self) -> Trained:
        """The network. Raises `CheckpointError` if a run that still trains has replaced it."""
        trained = load(self.run, pipeline=self.options)
        if trained.checkpoint != self.checkpoint:
            raise CheckpointError(f"{self.run} has a newer checkpoint now: run the command again")
        return trained

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names by label of the network, with the records' titles where those are the same."""
        own = tuple(str(name) for name in self.cached("classes", {}, self._class_names)["names"])
        try:
            if self.manifest.classes == own:
                return tuple(self.manifest.class_text(label) for label in range(len(own)))
        except DataError:
            pass
        return own

    def predictions(self, split: str, limit: int, mapped: int) -> Predictions:
        """Of the first `limit` images of a split (0: all), with features of `mapped` of them.

        Raises `DataError` if the records are gone, lack the split or have other classes.
        """
        if split not in self.manifest.splits:
            raise DataError(f"{self.manifest.root} has no {split} split")
        data = self.config.data
        records = self.manifest.splits[split].records
        count = min(limit or records, records)
        key = {
            "split": split,
            "count": count,
            "mapped": mapped,
            "content": self.manifest.content,
            "names": [*self.manifest.classes],
            "images": [getattr(data, name) for name in VIEW],
        }
        arrays = self.cached(split, key, lambda: self._pass(split, count, mapped))
        return Predictions(**{item.name: arrays[item.name] for item in fields(Predictions)})

    def cached(self, name: str, key: object, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays that were computed for this checkpoint and `key`, from the run's cache; else
        they are computed and written there, in place of older ones of this name."""
        files = json_value((self.checkpoint / "checkpoint.json").read_text())["files"]
        whole = json.dumps([FORMAT, files["state.pt"]["sha256"], key], sort_keys=True)
        digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        file = self.run / CACHE / f"{name}_{digest}.npz"
        try:
            return npz_arrays(file)
        except (OSError, ValueError):  # none, or damaged
            arrays = compute()
        try:
            file.parent.mkdir(exist_ok=True)
            for old in file.parent.glob(f"{name}_*.npz"):
                old.unlink()
            with atomic_file(file) as out:
                np.savez(out, allow_pickle=False, **arrays)
        except OSError as error:
            self.say(f"warning: {file} cannot be written ({error.strerror}): nothing is cached")
        return arrays

    def _class_names(self) -> Arrays:
        return {"names": np.array(self.trained.classes)}

    def _labels(self) -> torch.Tensor:
        """The network's label for each of the records' and, at the end, for none: (C + 1,)."""
        names, trained = self.manifest.classes, self.trained.classes
        if unknown := lacking(names, trained):
            raise DataError(
                f"{self.manifest.root}: {len(unknown)} of its {len(names)} classes are not among "
                f"the network's {len(trained)} ({first_few(unknown, 3)})"
            )
        return torch.tensor([*positions(names, trained), -1])

    @torch.no_grad()
    def _pass(self, split: str, count: int, mapped: int) -> Arrays:
        trained, began, printed = self.trained, time.perf_counter(), 0.0
        of_records = self._labels()
        draw = np.random.default_rng(0)
        places = np.sort(draw.choice(count, min(mapped, count), replace=False))
        parts: list[tuple[torch.Tensor, ...]] = []
        kept, done, wrong = [], 0, 0
        for images, given, valid in eval_loader(
            trained.config, self.manifest, DistEnv(0, 1, trained.device), split
        ):
            valid = min(valid, count - done)
            logits, features = trained.logits_and_features(images)
            inside = places[(places >= done) & (places < done + valid)] - done
            kept.append(features[torch.from_numpy(inside).to(features.device)].half().cpu())
            known, outside = within_classes(given[:valid], len(of_records) - 1, NO_LABEL)
            wrong += int(outside)
            labels = of_records.to(given.device)[known]
            parts.append(tuple(part.cpu() for part in _measure(logits[:valid], labels)))
            done += valid
            now = time.perf_counter()
            if done == count or now - printed > SECONDS:
                printed, speed = now, done / (now - began)
                left = f", {duration((count - done) / speed)} left" if done < count else ""
                self.say(
                    f"{self.run}: {done:,} of {count:,} {split} images, {speed:,.0f} images/s{left}"
                )
            if done >= count:
                break
        if wrong:
            raise wrong_labels(wrong, split, len(of_records) - 1, self.manifest.root)
        arrays = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        names = [item.name for item in fields(Predictions)]
        return dict(zip(names, (*arrays, places, torch.cat(kept).numpy()), strict=True))


def _measure(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first fields of `Predictions` for logits ``(B, C)`` and labels ``(B,)``."""
    log_p = logits.log_softmax(1)
    best = log_p.topk(min(GUESSES, log_p.shape[1]), dim=1)
    nll = -log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    nll = torch.where(labels >= 0, nll, torch.nan)
    squares = log_p.exp().square().sum(1)
    return labels.int(), best.indices.int(), best.values.exp(), nll, squares
