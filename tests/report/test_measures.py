"""Measures agree with their plain definitions."""

import numpy as np
import pytest
from scipy.stats import binomtest

from mpl_fast.errors import DataError
from mpl_fast.report import measures
from mpl_fast.report.embedding import embed
from mpl_fast.report.names import shown


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (1, 3), (947, 1000)])
def test_wilson(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert measures.wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_expected_calibration_error() -> None:
    draw = np.random.default_rng(0)
    confidence = np.concatenate([draw.random(500), [1.0, 1 / 15, 2 / 15]]).astype(np.float32)
    hits = draw.random(len(confidence)) < 0.6
    exact, expected, images = confidence.astype(np.float64), 0.0, list[int]()
    for i in range(15):
        inside = (exact > i / 15) & (exact <= (i + 1) / 15)
        images.append(int(inside.sum()))
        if inside.any():
            gap = abs(hits[inside].mean() - exact[inside].mean())
            expected += inside.mean() * gap
    found = measures.bins(confidence, hits)
    assert found.ece == pytest.approx(expected, abs=1e-6)
    assert found.images.tolist() == images and sum(images) == len(confidence)


def test_confused_classes_are_neighbors() -> None:
    """Three families of classes, shuffled: each is in one piece of the order."""
    draw = np.random.default_rng(1)
    family = draw.permutation(np.repeat(np.arange(3), 5))
    same = family[:, None] == family
    matrix = draw.poisson(np.where(same, 8, 0.5))
    matrix[np.diag_indices(15)] = 60
    order = measures.confused_order(matrix)
    assert sorted(order) == list(range(15))
    assert (np.diff(family[order]) != 0).sum() == 2
    assert list(measures.confused_order(np.array([[3, 1], [0, 2]]))) == [0, 1]


def test_the_window_with_the_most_mistakes() -> None:
    draw = np.random.default_rng(2)
    matrix = draw.integers(0, 5, (20, 20))
    wrong = matrix - np.diag(np.diag(matrix))
    sums = [wrong[i : i + 6, i : i + 6].sum() for i in range(15)]
    assert measures.most_confused_window(matrix, 6) == int(np.argmax(sums))


def test_confusion_pairs_and_accuracy_by_class() -> None:
    truth, guess = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 0, 3])
    matrix = measures.confusion(truth, guess, 4)
    assert matrix[0].tolist() == [1, 2, 0, 0] and matrix.sum() == 6
    first, second = measures.confused_pairs(matrix, 9)
    assert first[:3] == (0, 1, 2) and first.share == pytest.approx(2 / 3)
    assert second == (1, 0, 1, 0.5)
    found = measures.class_accuracy(matrix)
    assert found.recall[:2] == pytest.approx([1 / 3, 0.5])
    assert found.precision[1] == pytest.approx(1 / 3)
    assert np.isnan(found.recall[2])


def test_a_paired_difference() -> None:
    first, second = np.array([1, 1, 1, 0, 1], bool), np.array([1, 0, 0, 1, 1], bool)
    gain, half = measures.difference(first, second)
    assert gain == pytest.approx(0.2)
    share = np.array([0, 1, 1, -1, 0])
    assert half == pytest.approx(1.96 * share.std() / np.sqrt(5), rel=1e-3)


def test_names_that_cannot_be_shown_as_they_are() -> None:
    assert shown(b"a\xff\n".decode("utf-8", "surrogateescape")) == r"a\xff\n"
    assert shown("n01440764 (tench)", 12) == "tench"
    assert shown("abcdefghij", 7) == "abc…hij"


def test_features_that_are_all_equal_have_no_map() -> None:
    with pytest.raises(DataError, match="equal"):
        embed(np.ones((20, 4), np.float16))
