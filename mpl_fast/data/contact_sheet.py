"""A PNG of training images: original, weak view and draws of the strong view, one image a row."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from PIL import Image, ImageDraw, ImageFont

from mpl_fast.config import DataConfig
from mpl_fast.data import pipelines
from mpl_fast.data.manifest import Manifest, Split
from mpl_fast.data.randaugment import strengthen
from mpl_fast.data.records import NO_LABEL
from mpl_fast.errors import ConfigError, output_errors, printable

Pixels = NDArray[np.uint8]
GAP = 6  # pixels between tiles
TITLE = 26  # pixels above them
CLASS_NAME = 14  # pixels below each row
LONGEST = 300  # characters of a class name that are measured
MIN_TILE = 96  # pixels; smaller views are enlarged by a whole number


def contact_sheet(
    config: DataConfig, manifest: Manifest, out: Path, *, images: int, draws: int, seed: int
) -> None:
    """Writes a PNG of ``images`` rows: original, weak view, and ``draws`` strong views.

    The views are computed by the functions of the training graph, on the CPU, and denormalized.
    Raises ConfigError if the split has fewer images, and OutputError if the file cannot be written.
    """
    split = manifest.splits["unlabeled"]
    if images > split.records:
        raise ConfigError(f"--images {images}: {split.index} has only {split.records} records")
    rows = draw_rows(config, split, images, draws, seed)
    zoom = -(-MIN_TILE // config.image_size)
    names = ["no label" if label == NO_LABEL else manifest.class_text(label) for label, _ in rows]
    tiles = [[tile.repeat(zoom, axis=0).repeat(zoom, axis=1) for tile in row] for _, row in rows]
    sheet = _arrange(tiles, titles(draws), names, zoom * config.image_size)
    with output_errors(out):
        sheet.save(out)


def titles(draws: int) -> list[str]:
    """Of the tiles of a row."""
    return ["original", "weak", *(f"strong {draw + 1}" for draw in range(draws))]


def draw_rows(
    config: DataConfig, split: Split, images: int, draws: int, seed: int
) -> list[tuple[int, list[Pixels]]]:
    """The class and the tiles of each row, as (h, w, 3) uint8."""
    engine = pipelines.Engine(batch=images, gpu=None, threads=1, shard=0, shards=1, seed=seed)
    pipeline = pipeline_def(_sheet_graph, enable_conditionals=True)(
        config, split, engine, draws, **engine.options(prefetch=1)
    )
    originals, *views, labels = pipeline.run()
    rows = []
    for row in range(images):
        drawn = [_denormalize(np.asarray(view.at(row)), config) for view in views]
        label = int(np.asarray(labels.at(row))[0])
        rows.append((label, [np.asarray(originals.at(row)), *drawn]))
    return rows


def _sheet_graph(
    config: DataConfig, split: Split, engine: pipelines.Engine, draws: int
) -> tuple[DataNode, ...]:
    encoded, label = pipelines.read_shuffled(config, split, engine)
    side = config.image_size
    original = fn.resize(
        pipelines.decode(encoded, config, engine),
        size=(side, side),
        mode="not_larger",
        antialias=True,
    )
    weak, *crops = pipelines.random_crops(encoded, config, engine, 1 + draws)
    views = [weak, *(strengthen(crop, config) for crop in crops)]
    return (
        original,
        *(pipelines.normalize(v, config, engine, pipelines.flip_coin(config)) for v in views),
        label,
    )


def _denormalize(view: NDArray[np.float32], config: DataConfig) -> Pixels:
    mean, std = np.array(config.mean), np.array(config.std)
    pixels: Pixels = np.clip(np.rint(255 * (view * std + mean)), 0, 255).astype(np.uint8)
    return pixels


def _arrange(
    tiles: list[list[Pixels]], heads: list[str], names: list[str], side: int
) -> Image.Image:
    """A white image with the tiles, titles above the columns, class names below the rows."""
    across, down = side + GAP, side + GAP + CLASS_NAME
    sheet = Image.new("RGB", (GAP + across * len(heads), TITLE + down * len(tiles)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, title in enumerate(heads):
        draw.text((GAP + across * column, 4), title, "black", ImageFont.load_default(15))
    for row, (line, name) in enumerate(zip(tiles, names, strict=True)):
        top = TITLE + down * row
        shown = printable(name[:LONGEST])
        while font.getlength(shown) > sheet.width - 2 * GAP:
            shown = f"{shown.removesuffix('...')[:-1]}..."
        draw.text((GAP, top + side), shown, "gray", font)
        for column, tile in enumerate(line):
            below, beside = ((side - length) // 2 for length in tile.shape[:2])
            corner = (GAP + across * column + beside, top + below)
            sheet.paste(Image.fromarray(tile), corner)
    return sheet
