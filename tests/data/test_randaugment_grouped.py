"""Policy mpl with few operators: each operation, and the draws, beside the branched reference."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from mpl_fast.config import DataConfig
from mpl_fast.data import randaugment
from mpl_fast.data.grouped import MOVES, NAMES, apply_code
from tests.data.operations_by_pillow import (
    CENTER,
    CIFAR,
    Pixels,
    by_dali,
    photographs,
    pixel,
    strong_views,
)

CODES = 2 * len(NAMES)
ROUNDED = {"Contrast", "AutoContrast"}  # within a gray level of the reference
GPU = pytest.param(True, marks=pytest.mark.gpu)
# A gray level of 0.8 times the nominal strength, at which no operation is another's double.
DISTINCT = replace(CIFAR, magnitude=8.0, num_ops=1)


def by_code(
    config: DataConfig, images: list[Pixels], codes: list[int], *, gpu: bool = False
) -> list[Pixels]:
    """Every image with its own code, in one mixed batch."""

    def graph() -> DataNode:
        image = fn.external_source(source=lambda: images, layout="HWC")
        code = fn.external_source(source=lambda: [np.int32(code) for code in codes])
        center = types.Constant([float(value) for value in pixel(CENTER, config)])
        return apply_code(image.gpu() if gpu else image, code, center, config)

    pipeline = pipeline_def(graph, enable_conditionals=True)(
        batch_size=len(images), num_threads=2, device_id=0 if gpu else None
    )
    (output,) = pipeline.run()
    return [np.array(image) for image in output.as_cpu()]


@pytest.mark.parametrize("gpu", [False, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("magnitude", [5.0, 8.0, 10.0, 17.0])
@pytest.mark.parametrize("size", [DataConfig(), CIFAR], ids=["imagenet", "cifar"])
def test_each_operation_equals_the_branched_one(
    size: DataConfig, magnitude: float, gpu: bool
) -> None:
    """Equal, but for rotation, of whose pixels 0.1 % have another nearest neighbor, and a gray
    level where Contrast and AutoContrast round. The reference is not as close to Pillow."""
    config = replace(size, magnitude=magnitude)
    images = photographs(config.image_size)
    codes = [code for code in range(CODES) for _ in images]
    results = by_code(config, images * CODES, codes, gpu=gpu)
    for code in range(CODES):
        name, sign = NAMES[code // 2], (-1, 1)[code % 2]
        for number in range(len(images)):
            result = results[code * len(images) + number].astype(int)
            off = np.abs(result - by_dali(config, sign, gpu)[name][number])
            if name == "Rotate":
                assert (off.max(axis=-1) > 0).mean() < 0.001, name
            elif name in ROUNDED:
                assert off.max() <= 1, name
                assert off.mean() < 0.1, name
            else:
                assert off.max() == 0, name


def test_every_operation_is_drawn_evenly_and_really_applied() -> None:
    """By what became of a photograph: 10,000 of them, one layer."""
    image = photographs(32)[0]
    forced = by_code(DISTINCT, [image] * CODES, list(range(CODES)))
    names = [f"{name}{sign if name in MOVES else ''}" for name in NAMES for sign in "-+"]
    known = {result.tobytes(): name for result, name in zip(forced, names, strict=True)}
    known = {result: name for result, name in known.items() if name != "Cutout"}
    known[image.tobytes()] = "none"
    assert len(known) == 1 + 2 * len(MOVES) + 9  # all different
    views = strong_views(image, DISTINCT, rounds=20)
    found = Counter(known.get(view.tobytes()) or cutout(view, image) for view in views)
    assert abs(found.pop("none") / len(views) - 0.5) < 0.02
    total = found.total()
    assert set(found) == set(names)
    weights = {name: 1 / 30 if name[:-1] in MOVES else 1 / 15 for name in found}
    chi2 = sum((found[name] / total - share) ** 2 / share for name, share in weights.items())
    assert total * chi2 < 43.8  # 19 degrees, p = 0.001


def cutout(view: Pixels, image: Pixels) -> str:
    """Cutout, if the view is the image but for one gray rectangle."""
    rows, columns = np.nonzero((view != image).any(axis=-1))
    patch = view[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (patch == 128).all()
    return "Cutout"


def codes_drawn(monkeypatch: pytest.MonkeyPatch) -> NDArray[np.int64]:
    """Of 20,000 images: their two codes, -1 where a layer is not applied; (n, 2)."""

    def mark(image: DataNode, code: DataNode, center: DataNode, config: DataConfig) -> DataNode:
        return fn.cast_like(image * 64 + (code + 1), image)

    monkeypatch.setattr(randaugment, "apply_code", mark)
    config = DataConfig(num_ops=2, image_size=1)
    marked = strong_views(np.zeros((1, 1, 3), np.int32), config, rounds=40)
    digits = marked[:, 0, 0, 0].astype(int)
    return np.stack([digits // 64, digits % 64], axis=1) - 1


def test_layers_draw_for_themselves_and_share_a_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = codes_drawn(monkeypatch)
    applied = (codes >= 0).sum(axis=1)
    # E[p^2] of p ~ U(0.2, 0.8) is 0.28; two independent probabilities would give 0.25.
    assert abs((applied == 0).mean() - 0.28) < 0.012
    assert abs((applied == 2).mean() - 0.28) < 0.012
    drawn = codes[codes >= 0]
    expected = len(drawn) / CODES
    counts = np.bincount(drawn, minlength=CODES)
    assert ((counts - expected) ** 2 / expected).sum() < 58.3  # 29 degrees, p = 0.001
    both = codes[applied == 2]
    assert abs((both[:, 0] == both[:, 1]).mean() - 1 / CODES) < 0.008


def test_centers_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    def reveal(image: DataNode, code: DataNode, center: DataNode, config: DataConfig) -> DataNode:
        return fn.cast_like(image * 0 + 100 + center, image)

    monkeypatch.setattr(randaugment, "apply_code", reveal)
    config = DataConfig(num_ops=1, image_size=8)
    seen = strong_views(np.zeros((1, 1, 2), np.uint8), config, rounds=12)[:, 0, 0].astype(int)
    applied = seen[seen[:, 0] > 0] - 100
    for axis in (0, 1):
        counts = np.bincount(applied[:, axis], minlength=8)
        assert len(counts) == 8
        assert counts.min() > len(applied) / 8 * 0.8


def test_equal_seeds_give_equal_views() -> None:
    image = photographs(32)[0]
    first, again = (strong_views(image, replace(CIFAR, num_ops=2), 1, seed=5) for _ in range(2))
    other = strong_views(image, replace(CIFAR, num_ops=2), 1, seed=6)
    assert np.array_equal(first, again)
    assert (first == other).all(axis=(1, 2, 3)).mean() < 0.5
