"""A finished pack is kept when it is the one that is asked for, mended when files are gone, and
never replaced by another without --force."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import OutputError
from mpl_fast.packing.options import ImageOptions, PackOptions, SplitOptions
from mpl_fast.packing.pack import publish_pack
from mpl_fast.packing.plan.table import TABLE, open_table
from mpl_fast.packing.publish.existing_pack import changed_options, check_existing, require_same
from mpl_fast.packing.publish.out_folder import open_out_folder
from mpl_fast.packing.write.shard_receipt import ShardReceipt
from tests.packing.packs import KEEP, jpeg, make_tree, options_of, plan_work, write_shards

REMEDY = "choose another --out, or --force to replace it"
FIRST = "train-00000-of-00002.rec"


@pytest.fixture
def packed(tmp_path: Path) -> PackOptions:
    """Return the options of a finished pack of 12 images in two shards."""
    names = [f"{name}/{at}.jpg" for name in ("ant", "bee") for at in range(6)]
    tree = make_tree(tmp_path / "tree", {name: jpeg(at) for at, name in enumerate(names)})
    options = options_of(tree, tmp_path / "out", SplitOptions(labeled="4", shards=2))
    pack(options)
    return options


def pack(options: PackOptions) -> None:
    with open_out_folder(options.out) as folder:
        write_shards(plan_work(options), options.image)
        publish_pack(folder, 0.0)


def look(options: PackOptions) -> tuple[dict[str, Any], list[str]]:
    """Return what the folder of options holds, as a run with these options finds it."""
    with open_out_folder(options.out) as folder, open_table(plan_work(options) / TABLE) as plan:
        return check_existing(folder, plan, options.planned())


def refusal(options: PackOptions) -> str:
    before = {path.name: path.read_bytes() for path in options.out.iterdir()}
    with pytest.raises(OutputError) as caught:
        look(options)
    assert {path.name: path.read_bytes() for path in options.out.iterdir()} == before
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{options.out}: ")
    return line.removeprefix(f"{options.out}: ")


def change(options: PackOptions, edit: Callable[[dict[str, Any]], object]) -> None:
    path = options.out / "manifest.json"
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))


def test_same_pack(packed: PackOptions) -> None:
    manifest, broken = look(packed)
    assert broken == []
    assert manifest == json.loads((packed.out / "manifest.json").read_text())
    # What decides no byte may be another: processes, and where the images lie.
    moved = packed.out.with_name("moved")
    Path(packed.src[0]).rename(moved)
    assert look(replace(packed, src=(str(moved),), processes=7))[1] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labeled": "6"}, "labeled was 4, now 6"),
        ({"shards": 1}, "shards was 2, now 1"),
        ({"layout": "separate"}, "layout was shared, now separate"),
        ({"unlabeled": "rest"}, "unlabeled was all, now rest"),
        ({"order": "list", "shards": 3}, "shards was 2, now 3, order was shuffle, now list"),
    ],
)
def test_other_options(packed: PackOptions, changed: dict[str, Any], message: str) -> None:
    other = replace(packed, split=replace(packed.split, **changed))
    resplit = "make_rec.py resplit draws other labeled images for this one; else "
    hint = resplit if changed.keys() <= {"labeled", "unlabeled"} else ""
    assert refusal(other) == f"holds another pack ({message}); {hint}{REMEDY}"


def test_other_images(packed: PackOptions) -> None:
    image = Path(packed.src[0], "bee", "6.jpg")
    image.write_bytes(jpeg(50))
    message = f"holds another pack (its source's files were others); {REMEDY}"
    assert refusal(packed) == message
    image.unlink()
    change(packed, lambda stored: stored.update(plan_sha256="0" * 64))
    assert refusal(packed) == message
    image.with_name("5.jpg").write_bytes(jpeg(51) + b"longer")
    assert refusal(packed) == message
    treated = replace(packed, image=replace(KEEP, check="decode", short_side=8))
    assert refusal(treated) == (
        f"holds another pack (check was none, now decode, short_side was None, now 8); {REMEDY}"
    )


def test_touched_image(packed: PackOptions) -> None:
    os.utime(Path(packed.src[0], "bee", "5.jpg"), ns=(1, 1))
    line = refusal(packed)
    assert line in [
        f"its source changed after it was packed (images of train-0000{number}-of-00002.rec); "
        f"{REMEDY}"
        for number in range(2)
    ]


@pytest.mark.parametrize("name", ["classes.txt", "train_label.lst", "train.idx", "records.sqlite"])
def test_damaged_file(packed: PackOptions, name: str) -> None:
    path = packed.out / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert refusal(packed) == (
        f"holds a damaged pack ({path}: does not match the manifest (stale or damaged); pack "
        f"again); {REMEDY}"
    )
    path.unlink()
    assert refusal(packed).startswith(f"holds a damaged pack ({path}: No such file")


@pytest.mark.parametrize(
    "edit",
    [
        lambda stored: stored.pop("options"),
        lambda stored: stored.pop("bad"),
        lambda stored: stored.pop("table_sha256"),
        lambda stored: stored.update(options=7),
        lambda stored: stored.update(splits=[]),
        lambda stored: stored["shards"][0].pop("bytes"),
        lambda stored: stored.update(format="other"),
    ],
)
def test_damaged_manifest(packed: PackOptions, edit: Callable[[dict[str, Any]], object]) -> None:
    change(packed, edit)
    assert refusal(packed).startswith("holds a damaged pack (")
    (packed.out / "manifest.json").unlink()
    assert refusal(packed) == f"holds classes.txt of an unknown pack; {REMEDY}"


def test_images_left_out_are_no_longer_wanted(packed: PackOptions) -> None:
    Path(packed.src[0], "bee", "5.jpg").write_bytes(b"no image")
    skip = replace(packed, out=packed.out.with_name("skipped"), image=ImageOptions(on_bad="skip"))
    pack(skip)
    assert look(skip)[1] == []
    assert refusal(replace(skip, image=ImageOptions())) == (
        "holds a pack that left out 1 image that cannot be used (bee/5.jpg); --on-bad skip agrees "
        f"with that, or {REMEDY}"
    )


def test_broken_shards_are_named(packed: PackOptions) -> None:
    first, second = (packed.out / name for name in (FIRST, FIRST.replace("00000", "00001")))
    content = first.read_bytes()
    first.write_bytes(content[:-4])
    assert look(packed)[1] == [FIRST]
    second.unlink()
    assert look(packed)[1] == [FIRST, second.name]
    first.write_bytes(content[::-1])  # only sizes are looked at
    assert look(packed)[1] == [second.name]


def test_mended_shard_has_to_be_what_it_was(packed: PackOptions) -> None:
    (packed.out / FIRST).unlink()
    held = look(packed)
    with open_out_folder(packed.out) as folder:
        write_shards(plan_work(packed))
        require_same(folder, *held)
        path = folder.work / f"{FIRST}.done"
        done = ShardReceipt.load(path)
        other = folder.work / f"{FIRST.replace('00000', '00001')}.done"
        replace(ShardReceipt.load(other), sha256="0" * 64).save(other)
        require_same(folder, *held)  # that one was never broken
        replace(done, sha256="0" * 64).save(path)
        with pytest.raises(OutputError, match=f"{FIRST}, packed again, is not what it was; "):
            require_same(folder, *held)


def test_changes() -> None:
    assert changed_options({"a": 1, "b": None}, {"a": 1, "b": None}) == ""
    assert changed_options({"a": 1}, {"a": 2, "b": "x"}) == "a was 1, now 2, b was None, now x"
