"""DALI's own reader gets every record, byte for byte, from every layout of files and indexes."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali.pipeline import Pipeline

from mpl_fast.packing.publish.sparse_index import padded_lines
from tests.packing.small_pack import SmallPack, make_pack

# Five files of four records: 0-3, 4-7, 8-11, 12-15, 16-19. The letters are the three cases in
# which DALI's cursor goes astray: (a) a file in the middle has no record, (b) the first record
# is beyond the second file, (c) the last record is alone in its file, and not at its beginning.
LAYOUTS = {
    "a: the second file has no record": [0, 1, 3, 9, 10, 13, 14, 17, 18],
    "a, twice in a row": [2, 3, 13, 15, 17, 18],
    "b: begins in the third file": [9, 10, 11, 13, 14, 16, 19],
    "b: all in the last file": [17, 18, 19],
    "c: the last record is alone": [0, 5, 6, 7, 9, 13, 18],
    "a and c": [1, 2, 5, 18],
    "b and c: one record in all": [18],
    "a, b and c": [9, 10, 19],
}
MMAP = pytest.mark.parametrize("mmap", [True, False], ids=["mmap", "no-mmap"])
LAYOUT = pytest.mark.parametrize("chosen", LAYOUTS.values(), ids=LAYOUTS.keys())
Sample = tuple[bytes, float]


def _pipeline(
    pack: SmallPack,
    index: Path,
    batch: int,
    *,
    mmap: bool = True,
    checkpoint: Any = None,
    **options: Any,
) -> Pipeline:
    """`options` are the reader's."""

    def reader() -> Any:
        images, labels = fn.readers.mxnet(
            path=[str(path) for path in _files(pack)],
            index_path=[str(index)],
            name="reader",
            dont_use_mmap=not mmap,
            initial_fill=8,
            tensor_init_bytes=1024,
            **options,
        )
        return images, labels

    pipeline: Pipeline = pipeline_def(reader)(
        batch_size=batch,
        num_threads=1,
        device_id=None,
        seed=5,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    pipeline.build()
    return pipeline


def _samples(pipeline: Pipeline) -> list[Sample]:
    """Run once: the samples of one batch."""
    images, labels = pipeline.run()
    samples = []
    for image, label in zip(images, labels, strict=True):
        array = np.asarray(label)
        assert array.shape == (1,) and array.dtype == np.float32
        samples.append((np.asarray(image).tobytes(), float(array[0])))
    return samples


def _files(pack: SmallPack) -> list[Path]:
    return sorted(pack.root.glob("train*.rec"))


def _wanted(pack: SmallPack, ids: Iterable[int]) -> list[Sample]:
    return [(pack.records[number].image, float(pack.records[number].label)) for number in ids]


def _entries(pack: SmallPack, chosen: Sequence[int]) -> list[tuple[int, int, int]]:
    """Id, file and offset of each record."""
    files, records = [path.name for path in _files(pack)], [pack.records[n] for n in chosen]
    return [(r.id, files.index(r.file), r.start + r.offset) for r in records]


def _sparse_index(pack: SmallPack, chosen: Sequence[int], path: Path) -> Path:
    path.write_text("".join(padded_lines(_entries(pack, chosen))))
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> SmallPack:
    root = tmp_path_factory.mktemp("layouts") / "five"
    return make_pack(root, shards={"train": [4, 4, 4, 4, 4]})


@pytest.mark.parametrize(
    ("shards", "stick"), [(1, False), (2, False), (2, True), (3, False), (3, True)]
)
@MMAP
@pytest.mark.parametrize(
    "chosen", [*LAYOUTS.values(), list(range(20))], ids=[*LAYOUTS, "every record"]
)
def test_sparse_layouts_are_read_and_shared_out(
    five: SmallPack, tmp_path: Path, chosen: list[int], mmap: bool, shards: int, stick: bool
) -> None:
    """Reader k of n begins at record floor(k * records / n), and without stick goes on from there.

    DALI refuses more readers than records.
    """
    shards = min(shards, len(chosen))
    index = _sparse_index(five, chosen, tmp_path / "sparse.idx")
    borders = [len(chosen) * shard // shards for shard in range(shards + 1)]
    for shard, (begin, end) in enumerate(pairwise(borders)):
        own: dict[str, Any] = {"shard_id": shard, "num_shards": shards, "stick_to_shard": stick}
        pipeline = _pipeline(five, index, end - begin, mmap=mmap, **own)
        assert pipeline.reader_meta("reader")["epoch_size"] == len(chosen)
        assert _samples(pipeline) == _wanted(five, chosen[begin:end])
        after = chosen[begin:end] if stick else (chosen[end:] + chosen[:end])[: end - begin]
        assert _samples(pipeline) == _wanted(five, after)


@MMAP
def test_a_padded_index_is_shuffled_whole(five: SmallPack, tmp_path: Path, mmap: bool) -> None:
    chosen = LAYOUTS["a: the second file has no record"]
    index = _sparse_index(five, chosen, tmp_path / "sparse.idx")
    pipeline = _pipeline(five, index, len(chosen), mmap=mmap, random_shuffle=True)
    wanted = _wanted(five, chosen)
    epochs = [_samples(pipeline) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(wanted)
    assert any(epoch != wanted for epoch in epochs)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_checkpoint_goes_on_within_a_padded_index(
    five: SmallPack, tmp_path: Path, shuffle: bool
) -> None:
    chosen = LAYOUTS["a: the second file has no record"]
    index = _sparse_index(five, chosen, tmp_path / "sparse.idx")
    pipeline = _pipeline(five, index, 2, random_shuffle=shuffle)
    for _ in range(3):
        _samples(pipeline)
    state = pipeline.checkpoint()
    rest = [_samples(pipeline) for _ in range(4)]
    again = _pipeline(five, index, 2, random_shuffle=shuffle, checkpoint=state)
    assert [_samples(again) for _ in range(4)] == rest


@MMAP
@LAYOUT
def test_without_padding_these_layouts_fail(
    five: SmallPack, tmp_path: Path, chosen: list[int], mmap: bool
) -> None:
    """The reason for the padding; skipped by a DALI that does not need it any more."""
    index = tmp_path / "plain.idx"
    entries = _entries(five, chosen)
    index.write_text("".join(f"{number}\t{offset}\n" for number, _, offset in entries))
    try:
        read = _samples(_pipeline(five, index, len(chosen), mmap=mmap))
    except RuntimeError as error:
        assert "nvalid" in str(error)  # seek, or magic number
        return
    if read == _wanted(five, chosen):
        pytest.skip("this DALI reads this layout without padding")
    assert not mmap  # a wrong image without a word
