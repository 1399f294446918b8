"""Every operation computed by Pillow, by its own DALI graph and by its code; on photographs."""

import io
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from mpl_fast.config import DataConfig
from mpl_fast.data.grouped import apply_code
from mpl_fast.data.operations import OPERATIONS, Draws
from mpl_fast.data.randaugment import strengthen

Pixels = NDArray[np.uint8]
IMAGENET = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-1000.tar"
GRAY = (128, 128, 128)
CIFAR = DataConfig(image_size=32, translate=4.0, cutout=4)
CENTER = (0.25, 0.9)  # (y, x) as shares of the size, so near an edge that squares stick out


@cache
def photographs(size: int) -> list[Pixels]:
    """Two photographs of scikit-learn's, and six of ImageNet where it is at hand."""
    images = [Image.fromarray(array) for array in load_sample_images().images]
    if IMAGENET.exists():
        with tarfile.open(IMAGENET) as tar:
            members = [next(m for m in tar if m.isfile()) for _ in range(6)]
            for member in members:
                file = tar.extractfile(member)
                assert file is not None
                images.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
    return [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]


def pixel(share: tuple[float, float], config: DataConfig) -> tuple[int, int]:
    return int(share[0] * config.image_size), int(share[1] * config.image_size)


def by_pillow(name: str, image: Image.Image, config: DataConfig, sign: int) -> Image.Image:
    """The operation at the configured magnitude, from the published table and Pillow alone."""
    level = config.magnitude / 10
    factor = 1.8 * level + 0.1
    shear, shift = sign * 0.3 * level, sign * config.translate * level
    half, (y, x) = int(config.cutout * level), pixel(CENTER, config)

    def affine(*matrix: float) -> Image.Image:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GRAY
        )

    def cutout() -> Image.Image:
        cut = image.copy()
        ImageDraw.Draw(cut).rectangle((x - half, y - half, x + half - 1, y + half - 1), GRAY)
        return cut

    table: dict[str, Callable[[], Image.Image]] = {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(sign * 30 * level, fillcolor=GRAY),
        "Posterize": lambda: ImageOps.posterize(image, int(4 * level)),
        "Solarize": lambda: ImageOps.solarize(image, min(int(256 * level), 256)),
        "Color": lambda: ImageEnhance.Color(image).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "ShearX": lambda: affine(1, shear, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, shear, 1, 0),
        "TranslateX": lambda: affine(1, 0, shift, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, shift),
        "Cutout": cutout,
    }
    return table[name]()


@cache
def by_dali(config: DataConfig, sign: int, gpu: bool = False) -> dict[str, list[Pixels]]:
    """All operations on the photographs, each applied for certain, by its own graph."""
    images = photographs(config.image_size)

    def graph() -> tuple[DataNode, ...]:
        image = fn.external_source(source=lambda: images, layout="HWC")
        image = image.gpu() if gpu else image
        fixed_sign = fn.random.uniform(values=[float(sign)])
        draws = Draws(lambda: fixed_sign, _center(config))
        return tuple(operation.apply(image, draws, config) for operation in OPERATIONS)

    pipeline = pipeline_def(graph)(
        batch_size=len(images), num_threads=1, device_id=0 if gpu else None
    )
    outputs = [output.as_cpu() for output in pipeline.run()]
    return {
        operation.name: [np.asarray(output.at(row)) for row in range(len(images))]
        for operation, output in zip(OPERATIONS, outputs, strict=True)
    }


def by_code(
    config: DataConfig, images: list[Pixels], codes: list[int], *, gpu: bool = False
) -> list[Pixels]:
    """Every image with its own code, in one mixed batch."""

    def graph() -> DataNode:
        image = fn.external_source(source=lambda: images, layout="HWC")
        code = fn.external_source(source=lambda: [np.int32(code) for code in codes])
        return apply_code(image.gpu() if gpu else image, code, _center(config), config)

    pipeline = pipeline_def(graph, enable_conditionals=True)(
        batch_size=len(images), num_threads=2, device_id=0 if gpu else None
    )
    (output,) = pipeline.run()
    return [np.array(image) for image in output.as_cpu()]


def _center(config: DataConfig) -> DataNode:
    return types.Constant([float(value) for value in pixel(CENTER, config)])


def strong_views(image: Pixels, config: DataConfig, rounds: int, seed: int = 1) -> Pixels:
    """Strong views of 500 x rounds copies of one image: (n, H, W, 3)."""

    def graph() -> DataNode:
        constant = types.Constant(image, layout="HWC")
        return strengthen(constant, config)

    pipeline = pipeline_def(graph, enable_conditionals=True)(
        batch_size=500, num_threads=2, device_id=None, seed=seed
    )
    return np.concatenate([np.array(pipeline.run()[0].as_tensor()) for _ in range(rounds)])
