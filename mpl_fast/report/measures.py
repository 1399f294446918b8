"""What is computed from predictions: intervals, calibration, confusion, accuracy by class."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
BINS = 15
Z = 1.959963984540054  # of a 95 % interval


def wilson(hits: float, count: float) -> tuple[float, float]:
    """95 % interval by Wilson's score of a share of `hits` in `count` (above 0), from 0 to 1."""
    share, weight = hits / count, Z * Z / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * np.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """Accuracy of `first` minus that of `second`, ``(N,)`` hits on the same images, and half the
    width of its 95 % interval (normal, paired); both from -1 to 1."""
    gain = first.astype(np.float64) - second
    return float(gain.mean()), float(Z * gain.std() / np.sqrt(len(gain)))


class Bins(NamedTuple):
    """Predictions by their confidence, in bins of equal width from 0 to 1."""

    images: Ints  # (B,)
    confidence: Floats  # (B,) mean; NaN in an empty bin
    accuracy: Floats  # (B,)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy, by count."""
        full = self.images > 0
        gap = np.abs(self.confidence - self.accuracy)[full]
        return float((gap * self.images[full]).sum() / self.images.sum())


def bins(confidence: Floats, hits: NDArray[np.bool_], count: int = BINS) -> Bins:
    """`confidence` is that of the class predicted, ``(N,)``; bin i holds (i, i + 1] / `count`."""
    place = np.clip(np.ceil(confidence.astype(np.float64) * count) - 1, 0, count - 1).astype(int)
    number = np.bincount(place, minlength=count)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, v, minlength=count) / number for v in (confidence, hits)]
    return Bins(number, *means)


def confusion(truth: Ints, guess: Ints, classes: int) -> Ints:
    """``(C, C)`` counts: row = true class, column = class predicted."""
    flat = truth.astype(np.int64) * classes + guess
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def confused_order(matrix: Ints) -> Ints:
    """An order of the classes in which those that are confused are neighbors.

    Average-linkage clustering; the distance of two classes decreases with the mean of the shares of
    each that is taken for the other.
    """
    if len(matrix) < 3:
        return np.arange(len(matrix))
    rate = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    near = (rate + rate.T) / 2
    np.fill_diagonal(near, 0)
    far = 1 - near / max(near.max(), 1e-12)
    np.fill_diagonal(far, 0)
    tree = linkage(squareform(far, checks=False), "average", optimal_ordering=len(matrix) <= 300)
    order: Ints = leaves_list(tree)
    return order


def most_confused_window(matrix: Ints, size: int) -> int:
    """First of the `size` neighbors in an ordered matrix with the most mistakes among them."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    sums = np.pad(wrong.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    first = np.arange(len(matrix) - size + 1)
    end = first + size
    inside = sums[end, end] - sums[first, end] - sums[end, first] + sums[first, first]
    return int(inside.argmax())


class Pair(NamedTuple):
    """Images of one class that were taken for another."""

    truth: int
    guess: int
    images: int
    share: float  # of the images of the true class


def confused_pairs(matrix: Ints, most: int) -> list[Pair]:
    """The most frequent mistakes, by count."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = (divmod(int(flat), len(matrix)) for flat in order)
    return [
        Pair(t, g, int(wrong[t, g]), float(wrong[t, g] / matrix[t].sum()))
        for t, g in places
        if wrong[t, g]
    ]


class ClassAccuracy(NamedTuple):
    """By class, ``(C,)``; NaN where nothing was counted."""

    images: Ints  # of the class
    recall: Floats  # share of them that is predicted so: the accuracy of the class
    precision: Floats  # share of what is predicted so that is of the class


def class_accuracy(matrix: Ints) -> ClassAccuracy:
    """From a confusion matrix."""
    hits = np.diag(matrix)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ClassAccuracy(matrix.sum(1), hits / matrix.sum(1), hits / matrix.sum(0))
