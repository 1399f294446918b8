"""One DALI pipeline as a source of torch tensors, with DALI's failures told in one line."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_type
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import Split
from mpl_fast.data.pipelines import READER
from mpl_fast.errors import ConfigError, DataError

Output = TensorListCPU | TensorListGPU


class Stream:
    """A running pipeline whose outputs arrive as tensors of their own on the training device.

    Raises:
        DataError: the index does not list as many records as the manifest, or DALI cannot read a
            record or decode an image; DALI can never go on after that.
    """

    def __init__(
        self,
        build: Callable[[], Pipeline],
        split: Split,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._split, self._device, self._dtype = split, device, dtype
        with _told_in_one_line(split):
            self._pipeline = build()
        records = self._pipeline.reader_meta(READER)["epoch_size"]
        if records != split.records:
            raise DataError(
                f"{split.index}: DALI finds {records} records in it, the manifest has "
                f"{split.records}; the index is stale or damaged, pack again"
            )

    def __next__(self) -> tuple[Tensor, ...]:
        """Images as (B, 3, H, W) in channels_last of the training dtype, labels as (B,) int64."""
        *images, labels = self._outputs()
        views = [self._room(image.as_tensor().shape()) for image in images]
        return (*views, self._handed(images, labels, views))

    def into(self, *views: Tensor) -> Tensor:
        """Puts the next images into tensors such as `next` gives, and returns their labels."""
        *images, labels = self._outputs()
        return self._handed(images, labels, views)

    def state(self) -> bytes:
        """What an equal pipeline needs to go on after the last batch taken, prefetch or not."""
        checkpoint: bytes = self._pipeline.checkpoint()
        return checkpoint

    def _outputs(self) -> Sequence[Output]:
        """Of the next run; they are DALI's memory, which a later run may write to."""
        with _told_in_one_line(self._split):
            if self._pipeline.device_id is None:
                outputs: Sequence[Output] = self._pipeline.run()
            else:
                outputs = self._pipeline.run(torch.cuda.current_stream(self._device))
        return outputs

    def _handed(self, images: Sequence[Output], labels: Output, views: Sequence[Tensor]) -> Tensor:
        for image, view in zip(images, views, strict=True):
            view.permute(0, 2, 3, 1).copy_(self._seen(image))
        taken = self._seen(labels)
        return taken.flatten().clone() if taken.device.type == "cpu" else taken.flatten()

    def _room(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)

    def _seen(self, output: Output) -> Tensor:
        """An output on the training device; on a CPU it is DALI's own memory."""
        source = output.as_tensor()
        if self._device.type == "cpu":
            seen: Tensor = torch.utils.dlpack.from_dlpack(source)
            return seen
        on_gpu = isinstance(output, TensorListGPU)
        taken = torch.empty(
            source.shape(),
            dtype=to_torch_type[source.dtype],
            device=self._device if on_gpu else "cpu",
            pin_memory=not on_gpu,
        )
        feed_ndarray(source, taken, torch.cuda.current_stream(self._device) if on_gpu else None)
        return taken.to(self._device, non_blocking=True)


def dali_gpu(config: DataConfig, device: torch.device) -> int | None:
    """The CUDA device number for DALI, or None where it shall work on the CPU."""
    if config.device == "gpu" and device.type != "cuda":
        raise ConfigError(
            f"data.device is gpu, but training runs on {device.type}: use data.device=auto"
        )
    if config.device == "cpu" or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def cpu_threads(config: DataConfig) -> int:
    """DALI's threads for this rank: as configured, or its share of the cores it may use."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return config.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)


@contextmanager
def _told_in_one_line(split: Split) -> Iterator[None]:
    """Turns what DALI says of a bad record or image, a page without advice, into a DataError."""
    try:
        yield
    except RuntimeError as error:
        operator, reason = _reason(str(error))
        if operator not in ("readers", "decoders") or "CUDA" in reason:
            raise
        where = split.shards[0] if len(split.shards) == 1 else split.index
        what = "a record cannot be read" if operator == "readers" else "an image cannot be decoded"
        raise DataError(
            f"{where}: {what} ({reason}); `make_rec.py verify --deep {where.parent}` names it"
        ) from error


def _reason(message: str) -> tuple[str, str]:
    """The kind of operator that failed and the sentence that says why."""
    operator = re.search(r"operator `nvidia\.dali\.fn\.(\w+)\.", message)
    reason = message.rpartition("encountered:")[2].split("Current pipeline object")[0]
    reason = re.sub(r"C\+\+ context:.*", "", reason, flags=re.DOTALL)
    return operator.group(1) if operator else "", " ".join(reason.split()).rstrip(".")
