"""Policy mpl, a branch each: every operation beside Pillow's, and how operations are drawn."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from PIL import Image, ImageOps

from mpl_fast.config import DataConfig
from mpl_fast.data import randaugment
from mpl_fast.data.operations import Operation, operations
from mpl_fast.data.randaugment import own_deprecations_hidden
from tests.data.operations_by_pillow import (
    CIFAR,
    NAMES,
    by_dali,
    by_pillow,
    photographs,
    strong_views,
)

EXACT = {
    "Invert", "Posterize", "Solarize", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
}  # fmt: skip
GPU = pytest.param(True, marks=pytest.mark.gpu)


@pytest.mark.parametrize("gpu", [False, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [5.0, 10.0, 16.0])
@pytest.mark.parametrize("size", [DataConfig(), CIFAR], ids=["imagenet", "cifar"])
def test_operation_equals_pillow(size: DataConfig, magnitude: float, sign: int, gpu: bool) -> None:
    """Tolerances: none for what moves or masks whole values; 0.2 % of the pixels for rotation,
    whose nearest neighbor can tip over; 2 gray levels, 0.7 on average, for what rounds where
    Pillow truncates."""
    config = replace(size, magnitude=magnitude)
    for name, results in by_dali(config, sign, gpu).items():
        for image, result in zip(photographs(config.image_size), results, strict=True):
            expected = np.asarray(by_pillow(name, Image.fromarray(image), config, sign))
            off = np.abs(result.astype(int) - expected)
            if name in EXACT:
                assert off.max() == 0, name
            elif name == "Rotate":
                assert (off.max(axis=-1) > 2).mean() < 0.002, name
            else:
                assert off.max() <= 2, name
                assert off.mean() < 0.7, name


def test_every_operation_changes_a_photograph_at_16_but_solarize() -> None:
    for name, results in by_dali(DataConfig(magnitude=16.0), 1).items():
        changes = [
            np.abs(result.astype(int) - image).mean()
            for image, result in zip(photographs(224), results, strict=True)
        ]
        if name == "Solarize":  # its threshold is past white; in uint8 it would wrap to 153
            assert max(changes) == 0
        else:
            assert max(changes) > 1, name


def test_equalize_of_few_values() -> None:
    """Flat channels, two values, and too few pixels for one step each: nothing divides by zero."""
    flat = np.full((32, 32, 3), (0, 90, 255), np.uint8)
    halves = flat.copy()
    halves[:16] = (10, 200, 255)
    speck = flat.copy()
    speck[0, 0] = 77
    images = [flat, halves, speck]

    def graph() -> DataNode:
        image = fn.external_source(source=lambda: images, layout="HWC")
        return operations(CIFAR, image, image)["Equalize"](image)

    (output,) = pipeline_def(graph)(batch_size=3, num_threads=1, device_id=None).run()
    for row, image in enumerate(images):
        expected = np.asarray(ImageOps.equalize(Image.fromarray(image))).astype(int)
        assert np.abs(np.asarray(output.at(row)) - expected).max() <= 1


def mark(index: int) -> Operation:
    """An operation that appends its number to the image's gray level as a digit of base 16."""
    return lambda image: fn.cast_like(image * 16 + (index + 1), image)


def test_operations_are_drawn_evenly_and_share_one_probability_per_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marks = {name: mark(index) for index, name in enumerate(NAMES)}
    monkeypatch.setattr(randaugment, "operations", lambda config, sign, center: marks)
    config = DataConfig(policy="mpl_branched", num_ops=2, image_size=1)
    codes = strong_views(np.zeros((1, 1, 3), np.uint8), config, rounds=40)[:, 0, 0, 0].astype(int)
    none, both = (codes == 0).mean(), (codes >= 16).mean()
    # E[p^2] of p ~ U(0.2, 0.8) is 0.28; two independent probabilities would give 0.25.
    assert abs(none - 0.28) < 0.012
    assert abs(both - 0.28) < 0.012
    digits = np.concatenate([codes[codes > 0] % 16, codes[codes >= 16] // 16])
    counts = np.bincount(digits, minlength=16)[1:]
    expected = len(digits) / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-square, 14 degrees, p = 0.001
    repeated = (codes[codes >= 16] % 16 == codes[codes >= 16] // 16).mean()
    assert abs(repeated - 1 / 15) < 0.012  # with replacement


def test_signs_and_centers_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    def reveal(config: DataConfig, sign: DataNode, center: DataNode) -> dict[str, Operation]:
        return {"reveal": lambda image: fn.cast_like(image * 0 + 100 + 50 * sign + center, image)}

    monkeypatch.setattr(randaugment, "operations", reveal)
    config = DataConfig(policy="mpl_branched", num_ops=1, image_size=8)
    seen = strong_views(np.zeros((1, 1, 2), np.uint8), config, rounds=12)[:, 0, 0].astype(int)
    applied = seen[seen[:, 0] > 0]
    assert abs(len(applied) / len(seen) - 0.5) < 0.03
    assert abs((applied[:, 0] >= 150).mean() - 0.5) < 0.04
    for axis in (0, 1):
        counts = np.bincount(applied[:, axis] % 50, minlength=8)
        assert len(counts) == 8
        assert counts.min() > len(applied) / 8 * 0.8


def test_final_cutout_grays_one_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randaugment, "operations", lambda *_: {"none": lambda x: x})
    config = DataConfig(policy="mpl_branched", num_ops=1, image_size=32, final_cutout=8)
    views = strong_views(np.zeros((32, 32, 3), np.uint8), config, rounds=1)
    for view in views:
        rows, columns = np.nonzero(view[:, :, 0] == 128)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # one rectangle
        assert 8 <= height <= 16
        assert 8 <= width <= 16
        assert (view.astype(int).sum(axis=(0, 1)) == 128 * height * width).all()


def test_dali_policy_stops_at_level_10_and_grows_below() -> None:
    image = photographs(32)[0]
    at = {
        level: strong_views(image, replace(CIFAR, policy="dali", magnitude=level), 1)
        for level in (2.0, 10.0, 17.0)
    }
    assert np.array_equal(at[10.0], at[17.0])
    weak, full = (np.abs(at[level].astype(int) - image).mean() for level in (2.0, 10.0))
    assert 1 < weak < 0.8 * full


def test_only_dalis_own_deprecations_are_hidden() -> None:
    image = photographs(32)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strong_views(image, replace(CIFAR, policy="dali"), 1)
        with own_deprecations_hidden():
            warnings.warn("mine", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["mine"]
