"""Image files to the tensors of evaluation: those that cannot be decoded are named and left out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpl_fast.config import DataConfig
from mpl_fast.data.loader import returns_half
from mpl_fast.data.pipelines import Engine, encoded_pipeline
from mpl_fast.data.stream import Output, cpu_threads, dali_gpu, data_error, run, shared
from mpl_fast.errors import DataError
from mpl_fast.packing.options import ImageOptions
from mpl_fast.packing.write.image_check import find_fault, too_many_pixels
from mpl_fast.packing.write.pixels import PIXEL_LIMIT
from mpl_fast.packing.write.process_image import process_image

THREADS = 8  # that read files: disks answer many requests at a time
AHEAD = 2  # batches that are read before they are needed
CONVERT = ImageOptions(on_bad="convert")
SHOWN = 120  # characters of DALI's message, whose end has the reason


class Files(NamedTuple):
    """Image files of a batch by their place in the list of images, and why others are not used."""

    images: dict[int, bytes]
    faults: dict[int, str]


def read_files(
    batches: Iterable[range],
    read: Callable[[int], bytes],
    *,
    convert: bool,
    max_pixels: int = PIXEL_LIMIT,
) -> Iterator[Files]:
    """Reads batches of images by place, ahead of their use.

    Left out is what is no image by its first bytes, of a kind that DALI does not decode, or cut
    short, and what has more than `max_pixels` by its header. `convert` takes what OpenCV can decode
    of these, but for the last, as ``--on-bad convert`` of a pack.
    """

    def load(place: int) -> tuple[bytes, str]:
        try:
            image = read(place)
        except OSError as error:
            return b"", error.strerror or str(error)
        except DataError as error:
            return b"", str(error)
        if fault := too_many_pixels(image, max_pixels):
            return image, fault
        fault = find_fault(image, "header") or ""
        return _converted(image, fault, max_pixels) if fault and convert else (image, fault)

    waiting: deque[tuple[range, list[Future[tuple[bytes, str]]]]] = deque()

    def first() -> Files:
        places, futures = waiting.popleft()
        loaded = dict(zip(places, (future.result() for future in futures), strict=True))
        return Files(
            {place: image for place, (image, fault) in loaded.items() if not fault},
            {place: fault for place, (_, fault) in loaded.items() if fault},
        )

    with ThreadPoolExecutor(THREADS) as pool:
        for places in batches:
            waiting.append((places, [pool.submit(load, place) for place in places]))
            if len(waiting) > AHEAD:
                yield first()
        while waiting:
            yield first()


def _converted(image: bytes, fault: str, max_pixels: int = PIXEL_LIMIT) -> tuple[bytes, str]:
    done = process_image(image, "", replace(CONVERT, max_pixels=max_pixels))
    return (image, done.reason or fault) if done.image is None else (done.image, "")


class Decoder:
    """Evaluation's views of image files by DALI, on the device that ``data.device`` gives."""

    def __init__(
        self,
        config: DataConfig,
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        convert: bool,
    ) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._convert = convert
        self._engine = Engine(
            batch=batch,
            gpu=dali_gpu(config, device),
            threads=cpu_threads(config),
            shard=0,
            shards=1,
            half=returns_half(dtype, device),
        )

    def views(self, batches: Iterator[Files]) -> Iterator[tuple[Files, Tensor | None]]:
        """Each batch less the files that cannot be decoded, with the views of the others in order:
        (n, 3, H, W) normalized, in channels_last; None for no file.

        Raises RuntimeError if memory is full or the GPU fails.
        """
        taken: deque[Files] = deque()  # by DALI, which makes batches ahead

        def encoded() -> Iterator[list[NDArray[np.uint8]]]:
            for files in batches:
                taken.append(files)
                if files.images:
                    yield _arrays(files.images.values())

        while True:
            pipeline = encoded_pipeline(self._config, encoded(), self._engine)
            try:
                while True:
                    view = self._copy(run(pipeline, self._device)[0])
                    while not taken[0].images:
                        yield taken.popleft(), None
                    yield taken.popleft(), view
            except StopIteration:
                yield from ((files, None) for files in taken)
                return
            except RuntimeError as error:
                data_error(error, self._device)
            while taken:
                yield self._one_by_one(taken.popleft())

    def _one_by_one(self, files: Files) -> tuple[Files, Tensor | None]:
        """A batch of which a file may stop DALI: decodes those that look suspicious alone, and
        halves of the others until each part can be decoded."""
        images, faults, views = dict(files.images), dict(files.faults), dict[int, Tensor]()
        suspects = [place for place, image in images.items() if find_fault(image, "decode")]
        groups = [[place] for place in suspects]
        groups.append([place for place in images if place not in {*suspects}])
        while groups:
            group = groups.pop()
            try:
                views |= zip(group, self._decode([images[place] for place in group]), strict=True)
                continue
            except RuntimeError as error:
                text = data_error(error, self._device)
            if len(group) > 1:
                half = len(group) // 2
                groups += [group[:half], group[half:]]
                continue
            (place,) = group
            why = find_fault(images[place], "decode")
            fault = why or f"DALI cannot decode it: ...{text[-SHOWN:]}"
            if self._convert and images[place] is files.images[place]:
                images[place], fault = _converted(images[place], fault)
            if fault:
                faults[place] = fault
            else:
                groups.append(group)
        good = {place: image for place, image in files.images.items() if place in views}
        rows = [views[place] for place in good]
        view = torch.stack(rows).contiguous(memory_format=torch.channels_last) if rows else None
        return Files(good, faults), view

    def _decode(self, images: Sequence[bytes]) -> Sequence[Tensor]:
        if not images:
            return ()
        pipeline = encoded_pipeline(self._config, iter([_arrays(images)]), self._engine)
        return self._copy(run(pipeline, self._device)[0]).unbind()

    def _copy(self, output: Output) -> Tensor:
        given = shared(output, self._device)  # (n, H, W, 3)
        view = torch.empty(given.shape, dtype=self._dtype, device=self._device)
        return view.copy_(given).permute(0, 3, 1, 2)


def _arrays(images: Iterable[bytes]) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(image, np.uint8) for image in images]
