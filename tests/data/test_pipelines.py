"""The graphs: views share a crop or have one each, and a flip each; crops are as published."""

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from PIL import Image
from sklearn.datasets import load_sample_images

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Manifest
from mpl_fast.data.pipelines import EVAL_CROPS, Engine, _eval_graph, _train_graph, decode, resize
from mpl_fast.data.position import GRAPH
from tests.data.numbered_images import eval_loader, pack_folder, train_loader

Pixels = NDArray[np.uint8]
# Outputs are gray levels / 255.
RAW = DataConfig(image_size=32, mean=(0, 0, 0), std=(1, 1, 1), translate=4, cutout=4, num_ops=1)


def ramp(side: int) -> Pixels:
    """Red is the row and green the column, from 0 to 255."""
    steps = np.linspace(0, 255, side).round().astype(np.uint8)
    rows, columns = np.meshgrid(steps, steps, indexing="ij")
    return np.stack([rows, columns, np.full_like(rows, 40)], axis=-1)


def packed(folder: Path, images: dict[str, bytes], copies: int = 1) -> Manifest:
    """One class with these files, each under several names, as training and validation data."""
    source = folder / "images" / "one"
    source.mkdir(parents=True)
    for name, content in images.items():
        for copy in range(copies):
            (source / f"{copy}{name}").write_bytes(content)
    total, src = str(len(images) * copies), source.parent
    return pack_folder(src, folder / "rec", val=src, labeled=total)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Four equal 256 x 256 ramps."""
    content = encoded(Image.fromarray(ramp(256)), "PNG")
    return packed(tmp_path_factory.mktemp("ramps"), {"ramp.png": content}, copies=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Pixels]:
    """Four equal 32 x 32 noise images, and their pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "PNG")
    return packed(tmp_path_factory.mktemp("small"), {"noise.png": content}, copies=4), noise


def views(manifest: Manifest, config: DataConfig, batches: int) -> tuple[Pixels, Pixels]:
    """Weak and strong views as (n, H, W, 3) gray levels."""
    loader = train_loader(manifest, config, labeled=1, unlabeled=4)
    drawn = [next(loader) for _ in range(batches)]
    weak = torch.cat([batch.weak for batch in drawn])
    strong = torch.cat([batch.strong for batch in drawn])
    return gray_levels(weak), gray_levels(strong)


def gray_levels(images: torch.Tensor) -> Pixels:
    levels: Pixels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return levels


def evaluated(manifest: Manifest, config: DataConfig) -> Pixels:
    loader = eval_loader(manifest, config)
    return np.concatenate([gray_levels(images[:count]) for images, _, count in loader])


def assert_views_share_their_crop(first: Pixels, second: Pixels) -> None:
    """Where no operation was applied, about half of the images, the views are equal."""
    equal = (first == second).all(axis=(1, 2, 3))
    assert 0.35 < equal.mean() < 0.75  # not applied, or an operation that leaves this image alone
    assert len({view.tobytes() for view in first}) > 40


def test_views_flip_each_for_itself(ramps: Manifest) -> None:
    """All four pairs of flips come, each about a quarter of the time; green grows to the right."""
    first, second = views(ramps, RAW, batches=100)
    mirrored = second[:, :, ::-1]
    untouched = (first == second).all(axis=(1, 2, 3)) | (first == mirrored).all(axis=(1, 2, 3))
    assert untouched.sum() > 100
    flips = [
        view[untouched][:, 16, 0, 1] > view[untouched][:, 16, -1, 1] for view in (first, second)
    ]
    for one, other in itertools.product((False, True), repeat=2):
        assert 0.15 < ((flips[0] == one) & (flips[1] == other)).mean() < 0.35


def test_views_share_their_crop(ramps: Manifest) -> None:
    assert_views_share_their_crop(*views(ramps, replace(RAW, flip=False), batches=100))


@pytest.mark.parametrize(("strong_crop", "number"), [("shared", 0), ("own", 0), ("own", 1)])
def test_imagenet_crop_is_the_published_one(
    strong_crop: Literal["shared", "own"], number: int, ramps: Manifest
) -> None:
    """Area 8 to 100 %, aspect 3/4 to 4/3, anywhere; read off the ramp's ends in each crop."""
    config = replace(RAW, flip=False, num_ops=0, strong_crop=strong_crop)
    pair = views(ramps, config, batches=100)
    equal = (pair[0] == pair[1]).all(axis=(1, 2, 3)).mean()
    assert equal == 1 if strong_crop == "shared" else equal < 0.02
    first = pair[number]
    rows, columns = first[:, :, 16, 0].astype(float), first[:, 16, :, 1].astype(float)
    # 32 samples at the middles of 32 strips span 31/32 of the crop.
    heights, widths = (np.ptp(line, axis=1) / 255 * 32 / 31 for line in (rows, columns))
    areas, aspects = heights * widths, widths / heights
    assert areas.min() > 0.07
    assert areas.min() < 0.14
    assert 0.85 < areas.max() < 1.05
    assert 0.70 < aspects.min() < 0.80
    assert 1.25 < aspects.max() < 1.42
    assert abs(np.median(areas) - 0.5) < 0.1
    assert rows.min() < 10
    assert rows.max() > 245


def test_cifar_crop_pads_4_gray_pixels(small: tuple[Manifest, Pixels]) -> None:
    """Every crop is one of the 81 of the padded image, bit for bit, and nearly all of them come.
    Evaluation changes nothing."""
    manifest, noise = small
    padded = np.pad(noise, ((4, 4), (4, 4), (0, 0)), constant_values=128)
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    first, second = views(manifest, replace(RAW, crop="pad_crop", flip=False), batches=100)
    assert_views_share_their_crop(first, second)
    places = [windows[view.tobytes()] for view in first]
    assert len(set(places)) > 70
    images = evaluated(manifest, replace(RAW, crop="pad_crop"))
    assert images.shape == (4, 32, 32, 3)
    assert (images == noise).all()


def test_strong_views_have_cifar_crops_of_their_own(small: tuple[Manifest, Pixels]) -> None:
    """The places of both are independent: all 81 of each, and as often the same as by chance."""
    manifest, noise = small
    padded = np.pad(noise, ((4, 4), (4, 4), (0, 0)), constant_values=128)
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    config = replace(RAW, crop="pad_crop", flip=False, num_ops=0, strong_crop="own")
    pairs = zip(*views(manifest, config, batches=300), strict=True)
    weak, strong = np.array([[windows[v.tobytes()] for v in pair] for pair in pairs]).swapaxes(0, 1)
    for places in (weak, strong):
        assert len({*map(tuple, places)}) == 81
    for axis in (0, 1):
        assert abs((weak[:, axis] == strong[:, axis]).mean() - 1 / 9) < 0.04


@pytest.mark.parametrize("labeled_view", ["weak", "strong"])
def test_labeled_images_can_have_the_strong_view(
    labeled_view: Literal["weak", "strong"], small: tuple[Manifest, Pixels]
) -> None:
    """Which a cutout of everything makes gray."""
    config = replace(RAW, image_size=32, crop="pad_crop", num_ops=0, final_cutout=40)
    loader = train_loader(small[0], replace(config, labeled_view=labeled_view), unlabeled=4)
    gray = gray_levels(next(loader).labeled) == 128
    assert gray.all() == (labeled_view == "strong")


def by_pillow(
    image: Image.Image, side: int, crop: int, kind: Image.Resampling = Image.Resampling.BICUBIC
) -> NDArray[np.int64]:
    """Shorter side to ``side``, and the center; halves of a pixel are rounded up."""
    scale = side / min(image.size)
    size = [round(scale * length) for length in image.size]
    resized = np.asarray(image.resize((size[0], size[1]), kind))
    left, top = ((length - crop + 1) // 2 for length in size)
    return resized[top : top + crop, left : left + crop].astype(np.int64)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_imagenet_evaluation_is_pillows(
    interpolation: Literal["bicubic", "bilinear"], tmp_path: Path
) -> None:
    """64 / 0.875 = 73 pixels, center 64 x 64; within a gray level on average, wide and high."""
    wide, flower = (Image.fromarray(array) for array in load_sample_images().images)
    high = wide.rotate(90, expand=True)
    files = [encoded(image, "JPEG", quality=95) for image in (wide, flower, high)]
    kind = Image.Resampling[interpolation.upper()]
    expected = [by_pillow(Image.open(io.BytesIO(file)), 73, 64, kind) for file in files]
    manifest = packed(tmp_path, {f"{number}.jpg": file for number, file in enumerate(files)})
    found = set()
    other_kind = Image.Resampling["BILINEAR" if interpolation == "bicubic" else "BICUBIC"]
    for image in evaluated(manifest, replace(RAW, image_size=64, interpolation=interpolation)):
        off = [np.abs(image - other).mean() for other in expected]
        assert min(off) < 1.0
        wrong = by_pillow(Image.open(io.BytesIO(files[int(np.argmin(off))])), 73, 64, other_kind)
        assert min(off) < 0.5 * np.abs(image - wrong).mean()
        found.add(int(np.argmin(off)))
    assert found == {0, 1, 2}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_without_antialias_it_is_an_interpolation(
    interpolation: Literal["bicubic", "bilinear"], tmp_path: Path
) -> None:
    """As PyTorch interpolates, whose bicubic coefficient is -0.75 where DALI's is -0.5."""
    photograph = load_sample_images().images[0]
    file = encoded(Image.fromarray(photograph), "PNG")
    config = replace(RAW, image_size=64, crop="pad_crop", interpolation=interpolation)
    manifest = packed(tmp_path, {"photograph.png": file})
    pixels = torch.tensor(photograph).permute(2, 0, 1)[None].float()
    expected = F.interpolate(pixels, (64, 64), mode=interpolation)[0].permute(1, 2, 0).numpy()
    plain, smooth = (
        np.abs(evaluated(manifest, replace(config, antialias=antialias))[0] - expected).mean()
        for antialias in (False, True)
    )
    assert plain < 1.5 and smooth > 8


def test_the_fast_idct_is_nearly_the_accurate_one(tmp_path: Path) -> None:
    photograph = Image.fromarray(load_sample_images().images[0])
    manifest = packed(tmp_path, {"photograph.jpg": encoded(photograph, "JPEG", quality=90)})
    for config in (replace(RAW, image_size=64), replace(RAW, image_size=400, crop="pad_crop")):
        accurate, fast = (
            evaluated(manifest, replace(config, use_fast_idct=value))[0].astype(int)
            for value in (False, True)
        )
        assert 0 < np.abs(accurate - fast).mean() < 1


def resized_and_whole(files: list[bytes], config: DataConfig, *, whole: bool) -> list[Any]:
    """What evaluation crops from, on the CPU, and with `whole` also all of each image resized."""
    engine = Engine(batch=len(files), gpu=None, threads=1, shard=0, shards=1)
    arrays = [np.frombuffer(file, np.uint8) for file in files]

    def graph() -> tuple[DataNode, ...]:
        file = fn.external_source(source=lambda: arrays, dtype=types.UINT8, ndim=1)
        resized = EVAL_CROPS[config.crop](file, config, engine)
        side = round(config.image_size / config.eval_crop)
        if not whole:
            return (resized,)
        return resized, resize(decode(file, config, engine), side, "not_smaller", config)

    outputs = pipeline_def(graph)(**engine.options(1)).run()
    return [[np.array(output.at(i)) for i in range(len(files))] for output in outputs]


def noise_images(sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    return [encoded(Image.fromarray(noise[:h, :w]), "JPEG") for h, w in sizes]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_resizes_all_of_an_ordinary_image(
    interpolation: Literal["bicubic", "bilinear"],
) -> None:
    """Bit for bit, up to an aspect of 16."""
    files = noise_images([(500, 375), (333, 500), (1, 1), (1, 16), (37, 592), (592, 37), (64, 301)])
    files += [
        encoded(Image.new(mode, (90, 41), 77), form)
        for mode, form in (("L", "PNG"), ("RGB", "BMP"), ("RGB", "WEBP"), ("CMYK", "JPEG"))
    ]
    config = replace(RAW, image_size=64, interpolation=interpolation)
    resized, whole = resized_and_whole(files, config, whole=True)
    for one, other in zip(resized, whole, strict=True):
        assert np.array_equal(one, other)


def test_a_very_long_image_takes_no_more_memory_in_evaluation() -> None:
    """Of a strip of 20000 x 1 only the middle is resized: 256 x 4096, not 256 x 5 million."""
    strips = [Image.new("RGB", size, (9, 90, 200)) for size in ((20000, 1), (1, 20000), (9001, 9))]
    files = [encoded(strip, "PNG") for strip in strips]
    (resized,) = resized_and_whole(files, replace(RAW, image_size=224), whole=False)
    assert [image.shape[:2] for image in resized[:2]] == [(256, 4096), (4096, 256)]
    assert resized[2].shape[0] == 256 and resized[2].shape[1] < 4200
    assert all((image == (9, 90, 200)).all() for image in resized)


@pytest.mark.parametrize("size", [(2, 600), (600, 2), (1, 501), (11, 599)])
def test_evaluation_crops_the_middle_of_a_very_long_image(size: tuple[int, int]) -> None:
    """As if all of it were resized."""
    config = replace(RAW, image_size=64)
    (resized,), (whole,) = resized_and_whole(noise_images([size]), config, whole=True)
    assert resized.size < whole.size
    crops = [
        image[(image.shape[0] - 64) // 2 :, (image.shape[1] - 64) // 2 :][:64, :64].astype(int)
        for image in (resized, whole)
    ]
    assert np.abs(crops[0] - crops[1]).max() <= 1


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    content = encoded(Image.fromarray(ramp(32)), "JPEG", quality=100, exif=exif)
    manifest = packed(tmp_path, {"turned.jpg": content}, copies=4)
    for image in evaluated(manifest, replace(RAW, crop="pad_crop")):
        assert np.abs(image.astype(int) - ramp(32)).max() < 12
    first, _ = views(manifest, replace(RAW, flip=False), batches=2)
    assert (first[:, 30, 16, 0] > first[:, 2, 16, 0]).all()  # red still grows downwards
    assert (first[:, 16, 30, 1] > first[:, 16, 2, 1]).all()  # and green to the right


def test_gray_images_become_three_channels(tmp_path: Path) -> None:
    gray = Image.fromarray(ramp(32)[:, :, 0])
    (image,) = evaluated(
        packed(tmp_path, {"gray.jpg": encoded(gray, "JPEG", quality=100)}),
        replace(RAW, crop="pad_crop"),
    )
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - np.asarray(gray)[:, :, None]).max() <= 3


def training_graph(manifest: Manifest, config: DataConfig, gpu: int | None) -> Pipeline:
    engine = Engine(batch=2, gpu=gpu, threads=1, shard=0, shards=1)
    return pipeline_def(_train_graph, enable_conditionals=True)(
        config,
        manifest.splits["unlabeled"],
        engine,
        ("weak", "strong"),
        batch_size=2,
        device_id=gpu,
    )


@pytest.mark.slow
def test_graphs(ramps: Manifest) -> None:
    """DALI restores a state by the names of operators, which it numbers in the order of their
    construction. Whoever changes a graph on purpose increases `GRAPH` and replaces the hash."""
    names = []
    for policy, crop, gpu in itertools.product(
        ("mpl", "mpl_branched", "dali"), ("random_resized", "pad_crop"), (None, 0)
    ):
        if policy == "dali" and gpu is None:  # saved positions do not depend on its graph
            continue
        num_ops = 1 if policy == "dali" else 2
        config = replace(RAW, policy=policy, crop=crop, final_cutout=4, num_ops=num_ops)  # type: ignore[arg-type]
        outputs = training_graph(ramps, config, gpu)._graph_out
        operators = operators_behind(outputs)
        if policy != "dali":
            names += sorted(f"{o.name}({', '.join(i.name for i in o.inputs)})" for o in operators)
        if gpu is not None:
            assert_images_stay_on_the_gpu(outputs, operators)
            outputs = training_graph(ramps, replace(config, strong_crop="own"), gpu)._graph_out
            assert_images_stay_on_the_gpu(outputs, operators_behind(outputs))
    assert GRAPH == 2
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] == "159e974aa26f"


@pytest.mark.parametrize("crop", EVAL_CROPS)
def test_images_of_evaluation_stay_on_the_gpu(
    crop: Literal["random_resized", "pad_crop"], ramps: Manifest
) -> None:
    engine = Engine(batch=2, gpu=0, threads=1, shard=0, shards=1)
    outputs = pipeline_def(_eval_graph)(
        replace(RAW, crop=crop), ramps.splits["val"], engine, batch_size=2, device_id=0
    )._graph_out
    assert_images_stay_on_the_gpu(outputs, operators_behind(outputs))


def assert_images_stay_on_the_gpu(outputs: Sequence[DataNode], operators: list[Any]) -> None:
    """No operator there takes its data from another processor, and nothing but a decoder brings an
    image over: by the graph's description, without a GPU."""
    assert {output.device for output in outputs} == {"gpu"}
    flows = Counter(
        (operator._op.device, data.device)
        for operator in operators
        for data in operator.inputs[: operator.spec.NumRegularInput()]
    )
    assert set(flows) == {("cpu", "cpu"), ("mixed", "cpu"), ("gpu", "gpu")}
    assert flows["mixed", "cpu"] == 1


def operators_behind(outputs: Sequence[DataNode]) -> list[Any]:
    """Every operator that an output depends on, once."""
    found: dict[int, Any] = {}
    waiting = list(outputs)
    while waiting:
        operator = waiting.pop().source
        if id(operator) not in found:
            found[id(operator)] = operator
            waiting += operator.inputs
    return list(found.values())
