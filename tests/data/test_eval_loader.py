"""The evaluation loader: every image once on any ranks, and what damaged records give."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from mpl_fast.data.manifest import Manifest, Split
from mpl_fast.errors import DataError
from tests.data.numbered_images import CLASSES, PLAIN, VAL, eval_loader, levels


@pytest.mark.parametrize("world", [1, 2, 3, 5, 24])
def test_evaluation_counts_every_image_once(manifest: Manifest, world: int) -> None:
    loaders = [eval_loader(manifest, rank=rank, world=world) for rank in range(world)]
    for _ in range(2):
        seen: Counter[int] = Counter()
        for loader in loaders:
            batches = list(loader)
            assert len(batches) == len(loader) == len(loaders[0])
            for images, labels, count in batches:
                assert images.shape == (4, 3, 16, 16)
                assert images.is_contiguous(memory_format=torch.channels_last)
                assert labels.dtype == torch.int64
                numbers = [(value - 2) // 4 for value in levels(images[:count])]
                assert [number % CLASSES for number in numbers] == labels[:count].tolist()
                seen.update(numbers)
        assert seen == Counter(range(VAL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_keep_their_values(manifest: Manifest, dtype: torch.dtype) -> None:
    """Also while later ones are made: on a CPU they are in DALI's own memory."""
    loader = eval_loader(manifest, replace(PLAIN, image_size=96), dtype=dtype)
    held = [batch for _ in range(2) for batch in loader]
    copies = [(images.clone(), labels.clone()) for images, labels, _ in held]
    assert len(list(loader)) == len(loader)
    again = eval_loader(manifest, replace(PLAIN, image_size=96), dtype=dtype)
    new = [batch for _ in range(2) for batch in again]
    for (images, labels, _), copy, (expected, classes, _) in zip(held, copies, new, strict=True):
        assert images.dtype == dtype
        assert torch.equal(images, copy[0]) and torch.equal(labels, copy[1])
        assert torch.equal(images, expected) and torch.equal(labels, classes)


def test_a_batch_larger_than_the_split_and_a_pass_after_an_unfinished_one(
    manifest: Manifest,
) -> None:
    ((images, _, count),) = eval_loader(manifest, batch=40)
    assert images.shape[0] == 40
    assert count == VAL
    loader = eval_loader(manifest)
    whole = [levels(images) for images, _, _ in loader]
    for images, _, _ in loader:
        assert levels(images) == whole[0]
        break
    assert [levels(images) for images, _, _ in loader] == whole


def test_missing_split(manifest: Manifest) -> None:
    splits = {name: split for name, split in manifest.splits.items() if name != "val"}
    with pytest.raises(DataError, match="no val split"):
        eval_loader(replace(manifest, splits=splits))


def altered(manifest: Manifest, folder: Path, name: str, content: bytes) -> Manifest:
    """The manifest with the validation split's one .rec or .idx replaced, by a copy in folder."""
    val = manifest.splits["val"]
    (folder / name).write_bytes(content)
    files = {"val.idx": {"index": folder / name}, "val.rec": {"shards": (folder / name,)}}
    split = replace(val, shards=(joined(val, folder),))
    return replace(manifest, splits={"val": replace(split, **files[name])})  # type: ignore[arg-type]


def joined(split: Split, folder: Path) -> Path:
    """The shards in one file, where the index's offsets hold as well."""
    path = folder / "joined.rec"
    path.write_bytes(b"".join(shard.read_bytes() for shard in split.shards))
    return path


def test_stale_index(manifest: Manifest, tmp_path: Path) -> None:
    lines = manifest.splits["val"].index.read_bytes().splitlines(keepends=True)
    stale = altered(manifest, tmp_path, "val.idx", b"".join(lines[:-1]))
    with pytest.raises(DataError, match=r"val\.idx: DALI finds 22 records .* has 23.*pack again"):
        eval_loader(stale)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("decode", "nvImageCodec failure"), ("frame", "magic"), ("end", "bytes are available")],
)
def test_damaged_records_are_one_line(
    manifest: Manifest, tmp_path: Path, damage: str, reason: str
) -> None:
    content = bytearray(joined(manifest.splits["val"], tmp_path).read_bytes())
    offsets = [int(line.split()[1]) for line in manifest.splits["val"].index.open()]
    if damage == "decode":
        content[offsets[5] + 40 : offsets[5] + 60] = bytes(20)  # within the sixth image's header
    elif damage == "frame":
        content[offsets[5]] ^= 1
    else:
        del content[-20:]
    loader = eval_loader(altered(manifest, tmp_path, "val.rec", bytes(content)))
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "val.rec") in message
    assert "DALI cannot read a record or decode an image" in message
    assert f"`make_rec.py verify --deep {tmp_path}` finds damaged ones. DALI: ..." in message
    assert reason in message


def test_full_memory_is_not_taken_for_damaged_records(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(pipeline: Pipeline) -> None:
        raise RuntimeError(
            "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,"
            "\nencountered:\n\nCUDA allocation failed\nCan't allocate 7 bytes on device 0."
        )

    loader = eval_loader(manifest)
    monkeypatch.setattr(Pipeline, "run", run)
    with pytest.raises(RuntimeError, match="allocation failed"):
        list(loader)


@pytest.mark.gpu
def test_evaluation_on_cuda_equals_the_cpus(manifest: Manifest) -> None:
    there = eval_loader(manifest, device=torch.device("cuda", 0))
    for first, second in zip(eval_loader(manifest), there, strict=True):
        assert (first[0] - second[0].cpu()).abs().max() < 1 / 255
        assert torch.equal(first[1], second[1].cpu())
        assert first[2] == second[2]
