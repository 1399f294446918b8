"""The DALI graphs: one decode and one random crop feed both views, on a GPU or on the CPU alone.

The training crop of the "imagenet" view is google-research/meta_pseudo_labels/data_utils.py's: 8 to
100 % of the area, aspect 3/4 to 4/3, 10 attempts, bicubic (here smoothed where it shrinks, as in
Pillow). The "cifar" view pads with 4 gray pixels and crops back, as there; that code crops and
flips the strong view once more after the cutout, here both views share their one crop. The EXIF
orientation is not applied, as in torchvision. Evaluation differs from torchvision's by at most a
pixel: the longer side is rounded, not cut off, and so is the corner of the center crop.
"""

from dataclasses import dataclass

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.operations import FILL
from mpl_fast.data.randaugment import own_deprecations_hidden, strengthen

READER = "reader"
CIFAR_PADDING = 4  # pixels


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs one pipeline: batch, processor, CPU threads and the share of the records."""

    batch: int
    gpu: int | None
    """CUDA device number; None decodes and augments on the CPU."""
    threads: int
    shard: int
    shards: int
    seed: int = 0
    half: bool = False
    """Return float16 images instead of float32."""
    checkpoint: bytes | None = None
    """State of an equal pipeline to go on from."""


def train_pipeline(config: DataConfig, split: Split, engine: Engine, *, strong: bool) -> Pipeline:
    """Builds an endless shuffled pipeline that returns (weak, [strong,] label).

    Views are (batch, image_size, image_size, 3) normalized, labels (batch, 1) int64.
    """
    with own_deprecations_hidden():
        pipeline = pipeline_def(_train_graph, enable_conditionals=True)(
            config,
            split,
            engine,
            strong,
            batch_size=engine.batch,
            device_id=engine.gpu,
            num_threads=engine.threads,
            prefetch_queue_depth=config.prefetch,
            seed=engine.seed,
            enable_checkpointing=True,
            checkpoint=engine.checkpoint,
        )
        pipeline.build()
    return pipeline


def eval_pipeline(config: DataConfig, split: Split, engine: Engine) -> Pipeline:
    """Builds a pipeline over one fixed shard in file order that returns (image, label).

    Every epoch is padded to whole batches with the shard's last image. Shapes as in training.
    """
    pipeline = pipeline_def(_eval_graph)(
        config,
        split,
        engine,
        batch_size=engine.batch,
        device_id=engine.gpu,
        num_threads=engine.threads,
        prefetch_queue_depth=config.prefetch,
        seed=engine.seed,
    )
    pipeline.build()
    return pipeline


def _train_graph(
    config: DataConfig, split: Split, engine: Engine, strong: bool
) -> tuple[DataNode, ...]:
    encoded, label = read_shuffled(config, split, engine)
    crop = random_crop(encoded, config, engine)
    views = [crop, strengthen(crop, config)] if strong else [crop]
    normalized = [normalize(view, config, engine, flip_coin(config)) for view in views]
    return (*normalized, _label(label, engine))


def _eval_graph(config: DataConfig, split: Split, engine: Engine) -> tuple[DataNode, ...]:
    encoded, label = fn.readers.mxnet(
        name=READER,
        path=[str(path) for path in split.shards],
        index_path=[str(split.index)],
        tensor_init_bytes=split.record_bytes,  # a slot of the buffer; DALI's own default is 1 MiB
        shard_id=engine.shard,
        num_shards=engine.shards,
        stick_to_shard=True,
        pad_last_batch=True,
    )
    image = decode(encoded, config, engine)
    if config.crop == "random_resized":
        image = resize(image, round(config.image_size / config.eval_crop), "not_smaller", config)
    else:
        image = resize(image, config.image_size, "stretch", config)
    return normalize(image, config, engine, 0), _label(label, engine)


def read_shuffled(config: DataConfig, split: Split, engine: Engine) -> tuple[DataNode, DataNode]:
    """This rank's records as (encoded image, label (1,) float32), shuffled, without an end.

    Shards move on by one every epoch, so that each rank meets all the data.
    """
    encoded, label = fn.readers.mxnet(
        name=READER,
        path=[str(path) for path in split.shards],
        index_path=[str(split.index)],
        random_shuffle=True,
        initial_fill=max(1, min(config.shuffle_buffer, split.records // engine.shards)),
        tensor_init_bytes=split.record_bytes,
        shard_id=engine.shard,
        num_shards=engine.shards,
    )
    return encoded, label


def random_crop(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """Decodes and crops at random: (image_size, image_size, 3) uint8."""
    if config.crop == "random_resized":
        image = fn.decoders.image_random_crop(
            encoded,
            device=_decoder(engine),
            random_area=(0.08, 1.0),
            random_aspect_ratio=(3 / 4, 4 / 3),
            num_attempts=10,
            adjust_orientation=False,
            hw_decoder_load=config.hw_decoder_load,
        )
        return resize(image, config.image_size, "stretch", config)
    image = resize(decode(encoded, config, engine), config.image_size, "stretch", config)
    steps = [float(step) for step in range(-CIFAR_PADDING, CIFAR_PADDING + 1)]
    return fn.slice(
        image,
        start=fn.cast(fn.random.uniform(values=steps, shape=(2,)), dtype=types.INT32),
        shape=(config.image_size, config.image_size),
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )


def decode(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """RGB of the stored size: (h, w, 3) uint8."""
    return fn.decoders.image(
        encoded,
        device=_decoder(engine),
        adjust_orientation=False,
        hw_decoder_load=config.hw_decoder_load,
    )


def _decoder(engine: Engine) -> str:
    return "cpu" if engine.gpu is None else "mixed"


def resize(image: DataNode, side: int, mode: str, config: DataConfig) -> DataNode:
    """Antialiased; "stretch" makes a square, "not_smaller" keeps the aspect and fits the short
    side."""
    cubic = config.interpolation == "bicubic"
    kind = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
    return fn.resize(image, size=(side, side), mode=mode, interp_type=kind, antialias=True)


def flip_coin(config: DataConfig) -> DataNode | int:
    """A coin for each image of each view, or never."""
    return fn.random.coin_flip() if config.flip else 0


def normalize(
    image: DataNode, config: DataConfig, engine: Engine, mirror: DataNode | int
) -> DataNode:
    """Center crop, mirror and (x - mean) / std: (image_size, image_size, 3) float."""
    return fn.crop_mirror_normalize(
        image,
        crop=(config.image_size, config.image_size),
        mirror=mirror,
        mean=[255 * value for value in config.mean],
        std=[255 * value for value in config.std],
        output_layout="HWC",
        dtype=types.FLOAT16 if engine.half else types.FLOAT,
    )


def _label(label: DataNode, engine: Engine) -> DataNode:
    """(1,) int64 beside the images; the records hold float32, exact below 2**24."""
    label = fn.cast(label, dtype=types.INT64)
    return label if engine.gpu is None else label.gpu()
