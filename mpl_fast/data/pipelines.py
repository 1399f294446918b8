"""The DALI graphs: one decode feeds both views, on a GPU or on the CPU alone.

Crop "random_resized" is google-research/meta_pseudo_labels/data_utils.py's for ImageNet: 8 to 100 %
of the area, aspect 3/4 to 4/3, 10 attempts, bicubic (here antialiased where it shrinks, as in
Pillow, unless `antialias` is false). Crop "pad_crop", for CIFAR, pads with 4 gray pixels and crops
back, as there; that code crops and flips the strong view once more after the cutout, here it has
the weak view's crop, or one of its own (`strong_crop`). The EXIF orientation is not applied, as in
torchvision. Evaluation differs from torchvision's by at most a pixel: the longer side and the
corner of the center crop are rounded, not truncated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.operations import FILL
from mpl_fast.data.position import damaged
from mpl_fast.data.randaugment import strengthen

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

View = Literal["weak", "strong"]

READER = "reader"
PADDING = 4  # pixels, of pad_crop
RANDOM_REGION: dict[str, Any] = {  # of random_resized
    "random_area": (0.08, 1.0),
    "random_aspect_ratio": (3 / 4, 4 / 3),
    "num_attempts": 10,
}
RESTORE = "checkpoint"  # in messages of DALI about a state
SHOWN = 200  # characters of them
MAX_ASPECT = 16  # of the middle of an image that evaluation resizes


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a pipeline runs: batch size, device, CPU threads and shard of the records."""

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
    """State of an equal pipeline to continue from."""

    def options(self, prefetch: int) -> dict[str, Any]:
        """Options of a pipeline, for which `prefetch` batches are made ahead."""
        return {
            "batch_size": self.batch,
            "device_id": self.gpu,
            "num_threads": self.threads,
            "prefetch_queue_depth": prefetch,
            "seed": self.seed,
        }


def train_pipeline(
    config: DataConfig, split: Split, engine: Engine, views: Sequence[View]
) -> Pipeline:
    """Builds an endless shuffled pipeline that returns the views, then the label.

    Views are (batch, image_size, image_size, 3) normalized, labels (batch, 1) int64. Raises
    `CheckpointError` for a state that DALI cannot read.
    """
    pipeline = pipeline_def(_train_graph, enable_conditionals=True)(
        config,
        split,
        engine,
        views,
        **engine.options(config.prefetch),
        enable_checkpointing=True,
        checkpoint=engine.checkpoint,
    )
    try:
        pipeline.build()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        # DALI has one type of errors for everything.
        if engine.checkpoint is None or (isinstance(error, RuntimeError) and RESTORE not in text):
            raise
        raise damaged(f"...{text[-SHOWN:]}") from None
    return pipeline


def eval_pipeline(config: DataConfig, split: Split, engine: Engine) -> Pipeline:
    """Builds a pipeline over one fixed shard in file order that returns (image, label).

    Every epoch is padded to whole batches with the shard's last image. Shapes as in training.
    """
    pipeline = pipeline_def(_eval_graph)(config, split, engine, **engine.options(config.prefetch))
    pipeline.build()
    return pipeline


def encoded_pipeline(
    config: DataConfig, batches: "Iterable[Sequence[NDArray[np.uint8]]]", engine: Engine
) -> Pipeline:
    """Builds a pipeline over image files in memory that returns the images of `eval_pipeline`.

    A batch is at most `engine.batch` files, (bytes,) each; `run` raises StopIteration after the
    last. After a RuntimeError, as at a file that DALI cannot decode, it must not be used further.
    """
    pipeline = pipeline_def(_encoded_graph)(
        config, batches, engine, **engine.options(config.prefetch)
    )
    pipeline.build()
    return pipeline


def _train_graph(
    config: DataConfig, split: Split, engine: Engine, views: Sequence[View]
) -> tuple[DataNode, ...]:
    encoded, label = read_shuffled(config, split, engine)
    crops = random_crops(encoded, config, engine, len(views))
    images = [
        strengthen(crops[i], config) if views[i] == "strong" else crops[i]
        for i in range(len(views))  # DALI's AutoGraph has no zip with strict
    ]
    normalized = [normalize(image, config, engine, flip_coin(config)) for image in images]
    return (*normalized, _label(label, engine))


def _eval_graph(config: DataConfig, split: Split, engine: Engine) -> tuple[DataNode, ...]:
    encoded, label = _read(split, engine, stick_to_shard=True, pad_last_batch=True)
    return _eval_view(encoded, config, engine), _label(label, engine)


def _encoded_graph(
    config: DataConfig, batches: "Iterable[Sequence[NDArray[np.uint8]]]", engine: Engine
) -> DataNode:
    encoded = fn.external_source(source=batches, batch=True, dtype=types.UINT8, ndim=1)
    return _eval_view(encoded, config, engine)


def _eval_view(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    image = EVAL_CROPS[config.crop](encoded, config, engine)
    return normalize(image, config, engine, 0)


def read_shuffled(config: DataConfig, split: Split, engine: Engine) -> tuple[DataNode, DataNode]:
    """This rank's records as (encoded image, label (1,) float32), shuffled, endless.

    A rank reads the next shard every epoch, so that each rank reads all records in time.
    """
    fill = max(1, min(config.shuffle_buffer, split.records // engine.shards))
    return _read(split, engine, random_shuffle=True, initial_fill=fill)


def _read(split: Split, engine: Engine, **options: Any) -> tuple[DataNode, DataNode]:
    encoded, label = fn.readers.mxnet(
        name=READER,
        path=[str(path) for path in split.shards],
        index_path=[str(split.index)],
        tensor_init_bytes=split.record_bytes,  # a slot of the buffer; DALI's own default is 1 MiB
        # A mapped file that is cut short, or whose disk fails, ends a process by a SIGBUS. To copy
        # each record costs 50 microseconds of the reader's thread, 1 % of decoding it on a CPU.
        dont_use_mmap=True,
        shard_id=engine.shard,
        num_shards=engine.shards,
        **options,
    )
    return encoded, label


def random_crops(
    encoded: DataNode, config: DataConfig, engine: Engine, views: int
) -> list[DataNode]:
    """Decodes once and crops at random, for each view by itself with strong_crop own, else once
    for all: (image_size, image_size, 3) uint8."""
    if config.strong_crop == "own" and views > 1:
        image = decode(encoded, config, engine)
        return [DECODED_CROPS[config.crop](image, config) for _ in range(views)]
    return [random_crop(encoded, config, engine)] * views


def random_crop(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """Decodes and crops at random: (image_size, image_size, 3) uint8."""
    return TRAIN_CROPS[config.crop](encoded, config, engine)


def decode_crop(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """RGB of the random part of "random_resized", not resized: (h, w, 3) uint8."""
    return fn.decoders.image_random_crop(
        encoded,
        device=_decoder(engine),
        **RANDOM_REGION,
        adjust_orientation=False,
        use_fast_idct=config.use_fast_idct,
        hw_decoder_load=config.hw_decoder_load,
    )


def _random_resized(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    return resize(decode_crop(encoded, config, engine), config.image_size, "stretch", config)


def _random_resized_of(image: DataNode, config: DataConfig) -> DataNode:
    return fn.random_resized_crop(
        image,
        size=(config.image_size, config.image_size),
        interp_type=INTERPOLATIONS[config.interpolation],
        antialias=config.antialias,
        **RANDOM_REGION,
    )


def _pad_crop(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    return _pad_crop_of(decode(encoded, config, engine), config)


def _pad_crop_of(image: DataNode, config: DataConfig) -> DataNode:
    image = resize(image, config.image_size, "stretch", config)
    steps = [float(step) for step in range(-PADDING, PADDING + 1)]
    return fn.slice(
        image,
        start=fn.cast(fn.random.uniform(values=steps, shape=(2,)), dtype=types.INT32),
        shape=(config.image_size, config.image_size),
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=FILL,
    )


def _shorter_side(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """Only the middle of a very long image is resized: all of 20000 x 1 would take 5 GB."""
    size = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
    longest = MAX_ASPECT * fn.reductions.min(size)
    cut = (size - math.min(size, longest)) // 2  # at either end
    return resize(
        decode(encoded, config, engine),
        round(config.image_size / config.eval_crop),
        "not_smaller",
        config,
        roi_start=fn.cast(cut, dtype=types.FLOAT),
        roi_end=fn.cast(size - cut, dtype=types.FLOAT),
    )


def _whole(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    return resize(decode(encoded, config, engine), config.image_size, "stretch", config)


# By DataConfig.crop: a random crop, that of a decoded image, and what evaluation crops the center
# of.
TRAIN_CROPS = {"random_resized": _random_resized, "pad_crop": _pad_crop}
DECODED_CROPS = {"random_resized": _random_resized_of, "pad_crop": _pad_crop_of}
EVAL_CROPS = {"random_resized": _shorter_side, "pad_crop": _whole}
INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}


def decode(encoded: DataNode, config: DataConfig, engine: Engine) -> DataNode:
    """RGB of the stored size: (h, w, 3) uint8."""
    return fn.decoders.image(
        encoded,
        device=_decoder(engine),
        adjust_orientation=False,
        use_fast_idct=config.use_fast_idct,
        hw_decoder_load=config.hw_decoder_load,
    )


def _decoder(engine: Engine) -> str:
    return "cpu" if engine.gpu is None else "mixed"


def resize(
    image: DataNode, side: int, mode: str, config: DataConfig, **region: DataNode
) -> DataNode:
    """The image resized: mode "stretch" makes a square, "not_smaller" keeps the aspect ratio and
    makes the shorter side `side` pixels."""
    return fn.resize(
        image,
        size=(side, side),
        mode=mode,
        interp_type=INTERPOLATIONS[config.interpolation],
        antialias=config.antialias,
        **region,
    )


def flip_coin(config: DataConfig) -> DataNode | int:
    """Whether to mirror: drawn for each image of each view, or 0."""
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
