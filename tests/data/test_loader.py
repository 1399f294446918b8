"""The training loader: form of a batch, shards of ranks, resumption, refusals."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.batch import Batch
from mpl_fast.config import DataConfig
from mpl_fast.data import position
from mpl_fast.data.manifest import Manifest, read_manifest
from mpl_fast.data.operations import OPERATIONS
from mpl_fast.data.stream import cpu_threads
from mpl_fast.errors import CheckpointError, ConfigError, DataError
from tests.data.numbered_images import (
    CLASSES,
    CPU,
    PLAIN,
    level,
    levels,
    pack_folder,
    same,
    train_loader,
)

Started = tuple[dict[str, Any], Batch]


@pytest.fixture(scope="module")
def started(manifest: Manifest) -> Started:
    """The position of a loader after a batch, and its next batch."""
    loader = train_loader(manifest)
    next(loader)
    return loader.state(), next(loader)


@pytest.mark.slow
def test_form_labels_and_normalization_of_a_batch(manifest: Manifest) -> None:
    """(level / 255 - mean) / std, to the rounding of each type; bfloat16 by way of float16."""
    config = replace(PLAIN, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    gray = (255 * next(train_loader(manifest)).weak.double()).round() / 255
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (config.mean, config.std))
    for dtype, tolerance in (
        (torch.float64, 1e-6),
        (torch.float32, 1e-6),
        (torch.float16, 2e-3),
        (torch.bfloat16, 2e-2),
    ):
        batch = next(train_loader(manifest, config, dtype=dtype))
        for images, count in ((batch.labeled, 4), (batch.weak, 8), (batch.strong, 8)):
            assert images.shape == (count, 3, 16, 16)
            assert images.dtype == dtype
            assert images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.truth.dtype == torch.int64
        assert (batch.labels.shape, batch.truth.shape) == ((4,), (8,))
        assert (batch.weak.double() - (gray - mean) / std).abs().max() < tolerance


def test_labels_belong_to_their_images_and_a_batch_keeps_its_values(manifest: Manifest) -> None:
    loader = train_loader(manifest)
    first = next(loader)
    copy = Batch(*(tensor.clone() for tensor in first))
    for batch in (first, *(next(loader) for _ in range(9))):
        for images, labels in ((batch.labeled, batch.labels), (batch.weak, batch.truth)):
            numbers = [(value - 2) // 4 for value in levels(images)]
            assert [number % CLASSES for number in numbers] == labels.tolist()
    assert same(first, copy)


def test_labeled_only(manifest: Manifest) -> None:
    both, alone = train_loader(manifest), train_loader(manifest, unlabeled=0)
    for _ in range(3):
        batch, expected = next(alone), next(both)
        assert torch.equal(batch.labeled, expected.labeled)
        assert batch.weak.shape == batch.strong.shape == (0, 3, 16, 16)
        assert batch.truth.shape == (0,)
        assert batch.truth.dtype == torch.int64
    assert set(alone.state()) == {"made_with", "labeled"}


@pytest.mark.slow
def test_equal_arguments_give_equal_batches(manifest: Manifest) -> None:
    first, again, other, ranked = (
        train_loader(manifest),
        train_loader(manifest, replace(PLAIN, threads=3, prefetch=1)),
        train_loader(manifest, seed=1),
        train_loader(manifest, rank=1, world=2),
    )
    for _ in range(4):
        batch = next(first)
        assert same(batch, next(again))
        assert not torch.equal(batch.weak, next(other).weak)
        assert not torch.equal(batch.weak, next(ranked).weak)


def test_ranks_divide_an_epoch_and_change_shards(manifest: Manifest) -> None:
    """2 ranks x 5 batches of 5 unlabeled images are one epoch of 50, in a new order each time."""
    ranks = [train_loader(manifest, labeled=5, unlabeled=5, rank=r, world=2) for r in range(2)]
    epochs = []
    for _ in range(2):
        seen = [[n for _ in range(5) for n in levels(next(loader).weak)] for loader in ranks]
        assert sorted(seen[0] + seen[1]) == [level(n) for n in range(50)]
        epochs.append(seen)
    assert set(epochs[0][0]) == set(epochs[1][1])
    assert epochs[0][0] != sorted(epochs[0][0])
    assert epochs[0][0] != epochs[1][1]


def test_on_other_ranks_a_new_pass_begins(manifest: Manifest) -> None:
    """All images once, in an order of its own, which resumes; and only over the same records."""
    one = train_loader(manifest, labeled=10, unlabeled=10)
    next(one)
    ranks = partial(train_loader, manifest, labeled=5, unlabeled=5, world=2)
    passes = []
    for began in (1, 2):
        loaders = [ranks(rank=r, state=one.state(), began=began) for r in range(2)]
        seen = [n for loader in loaders for _ in range(5) for n in levels(next(loader).weak)]
        assert sorted(seen) == [level(n) for n in range(50)]
        passes.append(tuple(seen))
    assert len({*passes}) == 2
    assert same(next(ranks(rank=1, state=loaders[1].state())), next(loaders[1]))
    with pytest.raises(
        CheckpointError, match=r"with data\.flip=False, this run has data.flip=True"
    ):
        ranks(config=replace(PLAIN, flip=True), rank=0, state=one.state(), began=1)


@pytest.mark.parametrize(
    ("policy", "world", "crop", "strong_crop"),
    [
        ("mpl", 1, "random_resized", "shared"),
        ("mpl", 2, "pad_crop", "own"),
        pytest.param("dali", 2, "random_resized", "own", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise(
    manifest: Manifest, policy: str, world: int, crop: str, strong_crop: str
) -> None:
    """20 labeled and 50 unlabeled records: stops fall before, within and after epochs' ends. What
    was resumed can be resumed."""
    config = DataConfig(
        image_size=16, crop=crop, strong_crop=strong_crop, policy=policy, # type: ignore[arg-type]
        translate=4, cutout=4, final_cutout=2,
    )  # fmt: skip
    rank = world - 1
    whole = train_loader(manifest, config, rank=rank, world=world)
    made_with, state = whole.state()["made_with"], whole.state()
    for batches in (3, 3, 7, 3):
        part = train_loader(manifest, config, rank=rank, world=world, state=state)
        for _ in range(batches):
            assert same(next(part), next(whole))
        state = part.state()
        assert state["made_with"] == made_with


@pytest.mark.parametrize(
    ("key", "config", "sizes"),
    [
        ("labeled", PLAIN, {"labeled": 5}),
        ("unlabeled", PLAIN, {"unlabeled": 6}),
        ("seed", PLAIN, {"seed": 3}),
        ("world", PLAIN, {"world": 2}),
        ("data.image_size", replace(PLAIN, image_size=17), {}),
        ("data.crop", replace(PLAIN, crop="random_resized"), {}),
        ("data.strong_crop", replace(PLAIN, strong_crop="own"), {}),
        ("data.labeled_view", replace(PLAIN, labeled_view="strong"), {}),
        ("data.interpolation", replace(PLAIN, interpolation="bilinear"), {}),
        ("data.antialias", replace(PLAIN, antialias=False), {}),
        ("data.use_fast_idct", replace(PLAIN, use_fast_idct=True), {}),
        ("data.flip", replace(PLAIN, flip=True), {}),
        ("data.policy", replace(PLAIN, policy="dali"), {}),
        ("data.num_ops", replace(PLAIN, num_ops=3), {}),
        ("data.magnitude", replace(PLAIN, magnitude=9.0), {}),
        ("data.translate", replace(PLAIN, translate=5.0), {}),
        ("data.cutout", replace(PLAIN, cutout=5), {}),
        ("data.final_cutout", replace(PLAIN, final_cutout=4), {}),
        ("data.shuffle_buffer", replace(PLAIN, shuffle_buffer=7), {}),
    ],
)
def test_a_state_of_another_run_is_refused(
    manifest: Manifest, started: Started, key: str, config: DataConfig, sizes: dict[str, int]
) -> None:
    with pytest.raises(CheckpointError, match=f"{key}=.*{key}="):
        train_loader(manifest, config, **sizes, state=started[0])


def test_a_state_with_the_names_of_older_versions_is_read(
    manifest: Manifest, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options had other names, and neither how images are resized, nor which crop and view they
    have, nor the table of operations was kept."""
    state, following = started
    made_with = json.loads(state["made_with"])
    for name, value in (
        ("strong_crop", "shared"),
        ("labeled_view", "weak"),
        ("interpolation", "bicubic"),
        ("antialias", True),
        ("use_fast_idct", False),
    ):
        assert made_with.pop(f"data.{name}") == value
    # `test_table` compares the table with the earlier one.
    monkeypatch.setitem(position.EARLIER, "operations", made_with.pop("operations"))
    made_with["data.layers"] = made_with.pop("data.num_ops")
    assert made_with.pop("data.crop") == "pad_crop"
    old = {**state, "made_with": json.dumps(made_with | {"data.weak": "cifar"})}
    assert same(next(train_loader(manifest, state=old)), following)
    other = {**state, "made_with": json.dumps(made_with | {"data.weak": "imagenet"})}
    with pytest.raises(CheckpointError, match=r"data\.crop=random_resized.*data\.crop=pad_crop"):
        train_loader(manifest, state=other)
    with pytest.raises(CheckpointError, match=r"interpolation=bicubic.*interpolation=bilinear"):
        train_loader(manifest, replace(PLAIN, interpolation="bilinear"), state=old)


@pytest.mark.parametrize(("name", "value"), [("GRAPH", 1), ("OPERATIONS", OPERATIONS[1:])])
def test_a_state_of_another_version_of_the_code_is_refused(
    manifest: Manifest, started: Started, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI would restore it into whatever graph is there. Policy dali uses no table."""
    monkeypatch.setattr(position, name, value)
    with pytest.raises(CheckpointError, match="by another version of the input pipeline"):
        train_loader(manifest, state=started[0])
    if name == "OPERATIONS":
        dali = position.identity_of(replace(PLAIN, policy="dali"), manifest, None)
        monkeypatch.undo()
        assert dali == position.identity_of(replace(PLAIN, policy="dali"), manifest, None)


@pytest.mark.parametrize("damage", ["no bytes of DALI", "cut", "no position", "deep"])
def test_a_state_of_something_else_is_refused(
    manifest: Manifest, started: Started, damage: str
) -> None:
    """DALI's state has no pickle: it is a protocol buffer with JSON in it."""
    state = dict(started[0])
    if damage == "no position":
        del state["made_with"]
    elif damage == "deep":
        state["made_with"] = "[" * 100_000
    else:
        state["labeled"] = b"x" * 99 if damage == "no bytes of DALI" else state["labeled"][:-9]
    with pytest.raises(CheckpointError, match=r"the data position .* is damaged"):
        train_loader(manifest, state=state)


def test_a_state_of_other_records_is_refused(manifest: Manifest, started: Started) -> None:
    """As many records, but others: another draw, order or image."""
    base = manifest.root.parent
    split = {"labeled": "20", "shards": 3, "shuffle_seed": 9}
    other = pack_folder(base / "train", base / "other", val=base / "val", **split)
    counts = [[split.records for split in m.splits.values()] for m in (manifest, other)]
    assert counts[0] == counts[1]
    with pytest.raises(CheckpointError, match=r"the records in data\.root are others than the ch"):
        train_loader(other, state=started[0])


def test_records_may_be_moved(manifest: Manifest, started: Started, tmp_path: Path) -> None:
    moved = read_manifest(shutil.copytree(manifest.root, tmp_path / "moved"))
    assert same(next(train_loader(moved, state=started[0])), started[1])


def test_batch_larger_than_the_data(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"6 labeled images x 4 ranks = 24 .* has 20 records"):
        train_loader(manifest, labeled=6, world=4)
    with pytest.raises(ConfigError, match=r"51 unlabeled images x 1 ranks = 51 .* 50 records"):
        train_loader(manifest, unlabeled=51)
    with pytest.raises(ConfigError, match="0 labeled images"):
        train_loader(manifest, labeled=0, unlabeled=0)


def test_records_cut_short_while_they_are_read_are_one_line(
    manifest: Manifest, tmp_path: Path
) -> None:
    """Mapped into memory they would end the process by a SIGBUS."""
    copy = read_manifest(shutil.copytree(manifest.root, tmp_path / "copy"))
    loader = train_loader(copy, replace(PLAIN, shuffle_buffer=1))
    next(loader)
    for shard in copy.splits["unlabeled"].shards:
        os.truncate(shard, 0)
    with pytest.raises(DataError, match=r"copy/.*DALI cannot read a record"):
        for _ in range(50):
            next(loader)


def test_gpu_asked_for_without_cuda(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"data\.device is gpu, but training runs on cpu"):
        train_loader(manifest, replace(PLAIN, device="gpu"))


def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cpu_threads(PLAIN) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cpu_threads(PLAIN) == 1
    assert cpu_threads(replace(PLAIN, threads=5)) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cpu_threads(PLAIN) == 1


ON_EITHER = pytest.mark.parametrize("where", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def batches_of(manifest: Manifest, where: str, config: DataConfig) -> Iterator[Batch]:
    """Six batches, on the CPU, of a loader whose DALI runs on either processor."""
    device = torch.device("cuda", 0) if where == "gpu" else CPU
    loader = train_loader(manifest, replace(config, device=where), device=device)  # type: ignore[arg-type]
    for _ in range(6):
        yield Batch(*(tensor.cpu() for tensor in next(loader)))


def levels_off(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return 255 * (found.double() - expected.double()).abs()


@ON_EITHER
@pytest.mark.parametrize("policy", ["mpl", "mpl_branched"])
def test_a_gpu_augments_as_the_cpu_does(manifest: Manifest, policy: str, where: str) -> None:
    """The same draws, one operation an image: equal to 2 gray levels, but for pixels whose nearest
    neighbor tips over in a rotation."""
    config = replace(PLAIN, policy=policy, num_ops=1, magnitude=8.0, flip=True, threads=2)  # type: ignore[arg-type]
    changed = 0.0
    for found, expected in zip(
        batches_of(manifest, where, config), batches_of(manifest, "cpu", config), strict=True
    ):
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.truth, expected.truth)
        assert levels_off(found.labeled, expected.labeled).max() < 1.1
        assert levels_off(found.weak, expected.weak).max() < 1.1
        assert (levels_off(found.strong, expected.strong) > 2.1).double().mean() < 0.005
        changed += (levels_off(found.strong, found.weak).amax((1, 2, 3)) > 8).double().mean().item()
    assert changed / 6 > 0.3  # half of the images are drawn, and each view has its own flip


@ON_EITHER
def test_a_gpu_decodes_jpeg_as_the_cpu_does(tiny_rec: Path, where: str) -> None:
    """To the rounding of another decoder."""
    manifest = read_manifest(tiny_rec)
    for found, expected in zip(
        batches_of(manifest, where, PLAIN), batches_of(manifest, "cpu", PLAIN), strict=True
    ):
        assert torch.equal(found.truth, expected.truth)
        assert levels_off(found.weak, expected.weak).max() < 6.0
        assert levels_off(found.weak, expected.weak).mean() < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "more",
    [
        {"policy": "mpl"},
        {"policy": "dali"},
        {"strong_crop": "own"},
        {"strong_crop": "own", "crop": "random_resized"},
    ],
    ids=str,
)
def test_training_on_cuda(manifest: Manifest, where: str, more: dict[str, Any]) -> None:
    """DALI on either processor yields CUDA tensors, which stay as they are, and resumes bitwise."""
    config = replace(PLAIN, device=where, **more)  # type: ignore[arg-type]
    device = torch.device("cuda", 0)
    loader = partial(train_loader, manifest, config, device=device, dtype=torch.bfloat16)
    whole = loader()
    first = next(whole)
    copy = Batch(*(tensor.clone() for tensor in first))
    for _ in range(6):
        next(whole)
    resumed = loader(state=whole.state())
    for _ in range(4):
        batch = next(whole)
        assert same(batch, next(resumed))
        for images in (batch.labeled, batch.weak, batch.strong):
            assert images.device == device
            assert images.is_contiguous(memory_format=torch.channels_last)
        numbers = [round((value - 2) / 4) for value in levels(batch.weak)]
        assert [number % CLASSES for number in numbers] == batch.truth.tolist()
    assert same(first, copy)
