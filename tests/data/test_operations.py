"""The table of operations: each entry equals Pillow, its shared form equals the entry, and a new
entry is all that a new operation needs."""

import importlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from PIL import Image, ImageOps

from mpl_fast.config import DataConfig
from mpl_fast.data import grouped, operations, randaugment
from mpl_fast.data.operations import OPERATIONS, Draws, Operation, signature
from mpl_fast.data.position import EARLIER
from tests.data.operations_by_pillow import (
    CIFAR,
    by_code,
    by_dali,
    by_pillow,
    photographs,
    strong_views,
)

EXACT = {
    "Invert", "Posterize", "Solarize", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
}  # fmt: skip
ROUNDED = {"Contrast", "AutoContrast"}  # by code: within a gray level of the reference
GPU = pytest.mark.parametrize(
    "gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
SIZES = pytest.mark.parametrize("size", [DataConfig(), CIFAR], ids=["imagenet", "cifar"])


def test_table() -> None:
    """Numbers are the official code's positions, and go on from there; the signature of the
    official operations is what saved positions assume."""
    official = [
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color",
        "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
        "Cutout",
    ]  # fmt: skip
    numbers = {operation.name: operation.number for operation in OPERATIONS}
    assert sorted(numbers, key=lambda name: numbers[name])[: len(official)] == official
    assert sorted(numbers.values()) == list(range(len(OPERATIONS)))
    published = tuple(operation for operation in OPERATIONS if operation.name in official)
    assert signature(published) == EARLIER["operations"]
    assert signature(OPERATIONS[1:]) != signature(OPERATIONS) != signature(OPERATIONS[::-1])
    for operation in OPERATIONS:
        assert [operation.matrix, operation.line, operation.contrast].count(None) >= 2


@GPU
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [5.0, 10.0, 16.0])
@SIZES
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


@GPU
@pytest.mark.parametrize("magnitude", [5.0, 8.0, 10.0, 17.0])
@SIZES
@pytest.mark.slow
def test_operation_by_code_equals_its_own_graph(
    size: DataConfig, magnitude: float, gpu: bool
) -> None:
    """Equal, but for rotation, of whose pixels 0.1 % have another nearest neighbor, and a gray
    level where Contrast and AutoContrast round. The reference is not as close to Pillow."""
    config = replace(size, magnitude=magnitude)
    images, number = photographs(config.image_size), grouped.CODES
    codes = [code for code in range(number) for _ in images]
    results = iter(by_code(config, images * number, codes, gpu=gpu))
    for code in range(number):
        name, sign = grouped.BY_CODE[code // 2].name, (-1, 1)[code % 2]
        for expected in by_dali(config, sign, gpu)[name]:
            off = np.abs(next(results).astype(int) - expected)
            if name == "Rotate":
                assert (off.max(axis=-1) > 0).mean() < 0.001, name
            else:
                assert off.max() <= (name in ROUNDED), name
                assert off.mean() < 0.1, name


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
    equalize = next(operation for operation in OPERATIONS if operation.name == "Equalize")

    def graph() -> DataNode:
        image = fn.external_source(source=lambda: images, layout="HWC")
        return equalize.apply(image, Draws(lambda: image, image), CIFAR)

    (output,) = pipeline_def(graph)(batch_size=3, num_threads=1, device_id=None).run()
    for row, image in enumerate(images):
        expected = np.asarray(ImageOps.equalize(Image.fromarray(image))).astype(int)
        assert np.abs(np.asarray(output.at(row)) - expected).max() <= 1


def _tint(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
    return fn.cast_like(image * 0 + 100 + 10 * draws.sign(), image)


@pytest.fixture
def tint() -> Iterator[None]:
    """A table with one more entry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            operations, "OPERATIONS", (*OPERATIONS, Operation("Tint", len(OPERATIONS), _tint))
        )
        for module in (grouped, randaugment):
            importlib.reload(module)
        yield
    for module in (grouped, randaugment):
        importlib.reload(module)


@pytest.mark.parametrize("policy", ["mpl", "mpl_branched"])
@pytest.mark.slow
def test_a_new_operation_is_one_entry(tint: None, policy: str) -> None:
    image = photographs(32)[0]
    config = replace(CIFAR, policy=policy, num_ops=1, magnitude=8.0)  # type: ignore[arg-type]
    views = strong_views(image, config, rounds=8)
    tinted = [int(view[0, 0, 0]) for view in views if (view == view[0, 0, 0]).all()]
    assert set(tinted) == {90, 110}
    share = 0.5 / (len(OPERATIONS) + 1)  # an operation is applied to half of the images
    assert abs(len(tinted) / len(views) - share) < 0.012
