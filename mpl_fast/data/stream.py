"""One DALI pipeline as a source of torch tensors, with one-line errors for damaged records."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.pipelines import READER
from mpl_fast.distributed import cores_per_rank
from mpl_fast.errors import ConfigError, DataError

Output = TensorListCPU | TensorListGPU
# In DALI's messages of full memory and of a failing GPU (its libraries' texts).
NOT_DATA = ("CUDA runtime API error", "CUDA driver API error", "CUDA allocation", "Can't allocate")
SHOWN = 300  # characters of DALI's message, whose end has the reason


class Stream:
    """A running pipeline, whose outputs become tensors on the training device.

    Raises:
        DataError: the index does not list as many records as the manifest, or DALI cannot read a
            record or decode an image; the pipeline is then unusable.
    """

    def __init__(
        self, build: Callable[[], Pipeline], split: Split, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._split, self._device, self._dtype = split, device, dtype
        with self._data_errors():
            self._pipeline = build()
        records = self._pipeline.reader_meta(READER)["epoch_size"]
        if records != split.records:
            raise DataError(
                f"{split.index}: DALI finds {records} records in it, the manifest has "
                f"{split.records}; the index is stale or damaged, pack again"
            )

    def __next__(self) -> tuple[Tensor, ...]:
        """Images as (B, 3, H, W) in channels_last of the training dtype, labels as (B,) int64."""
        *images, labels = self._run()
        if self._device.type == "cpu":
            # In DALI's memory, which it uses again only when no tensor refers to it: a copy to new
            # memory takes a fifth of the time of decoding and resizing.
            kept = [shared(image, self._device).permute(0, 3, 1, 2) for image in images]
            own = [image.to(self._dtype) for image in kept]
            return (*own, shared(labels, self._device).flatten())
        views = [self._empty(image.as_tensor().shape()) for image in images]
        return (*views, self._copy(images, labels, views))

    def copy_to(self, *views: Tensor) -> Tensor:
        """Copies the next images to tensors such as `next` returns, and returns their labels."""
        *images, labels = self._run()
        return self._copy(images, labels, views)

    def state(self) -> bytes:
        """What an equal pipeline needs to continue after the last batch returned, whatever was
        prefetched."""
        checkpoint: bytes = self._pipeline.checkpoint()
        return checkpoint

    def _run(self) -> Sequence[Output]:
        """Outputs in DALI's memory, complete on a GPU before what is queued next."""
        with self._data_errors():
            return run(self._pipeline, self._device)

    def _copy(self, images: Sequence[Output], labels: Output, views: Sequence[Tensor]) -> Tensor:
        # On a GPU the copy of an output is only queued when this reference to it ends. DALI frees
        # memory that it shared by DLPack after the device has done all that was queued up to then
        # (`DLTensorGraveyard` in its dltensor.cc), and its executor (`exec_dynamic`, the default)
        # makes later batches in other memory.
        for image, view in zip(images, views, strict=True):
            view.permute(0, 2, 3, 1).copy_(shared(image, self._device))
        return shared(labels, self._device).flatten().clone()

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)

    @contextmanager
    def _data_errors(self) -> Iterator[None]:
        """Turns DALI's RuntimeError into a DataError, unless memory is full or the GPU fails.

        DALI raises this one type for everything. Of a pipeline's operators, only readers and
        decoders can fail on the data; the end of DALI's message is shown for other causes.
        """
        try:
            yield
        except RuntimeError as error:
            text, split = data_error(error, self._device), self._split
            where = split.shards[0] if len(split.shards) == 1 else split.index
            raise DataError(
                f"{where}: DALI cannot read a record or decode an image; `make_rec.py verify "
                f"--deep {where.parent}` finds damaged ones. DALI: ...{text[-SHOWN:]}"
            ) from error


def run(pipeline: Pipeline, device: torch.device) -> Sequence[Output]:
    """The next outputs in DALI's memory, complete on a GPU before what is queued next on `device`,
    the one for training."""
    if pipeline.device_id is None:
        outputs: Sequence[Output] = pipeline.run()
    else:
        outputs = pipeline.run(torch.cuda.current_stream(device))
    return outputs


def shared(output: Output, device: torch.device) -> Tensor:
    """An output on a device: where DALI ran there, in its memory."""
    # As in DALI's iterators, not by its `feed_ndarray`: that makes this stream wait for all
    # that DALI has queued, batches made ahead too, and DALI for all that is in this stream.
    tensor: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def data_error(error: RuntimeError, device: torch.device) -> str:
    """DALI's message in one line if the data may be its cause; else, if memory is full or the GPU
    fails, raises the error."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises after a CUDA error
    text = " ".join(str(error).split())
    if any(words in text for words in NOT_DATA):
        raise error
    return text


def dali_gpu(config: DataConfig, device: torch.device) -> int | None:
    """The CUDA device number for DALI, or None if DALI runs on the CPU."""
    if config.device == "gpu" and device.type != "cuda":
        raise ConfigError(
            f"data.device is gpu, but training runs on {device.type}: use data.device=auto"
        )
    if config.device == "cpu" or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def cpu_threads(config: DataConfig) -> int:
    """DALI's threads for this rank: as configured, or its share of the available cores."""
    return config.threads or cores_per_rank()
