"""A finished pack is kept when it is the planned one, and replaced only with --force."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import OutputError
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.pack import publish_pack
from mpl_fast.packing.plan.table import TABLE, open_table
from mpl_fast.packing.publish.existing_pack import changed_options, check_existing, require_same
from mpl_fast.packing.publish.out_folder import open_out_folder
from tests.packing.packs import KEEP, jpeg, make_tree, options_of, plan_work, write_shards

REMEDY = "choose another --out, or --force to replace it"
FIRST, SECOND = "train-00000-of-00002.rec", "train-00001-of-00002.rec"


@pytest.fixture
def packed(tmp_path: Path) -> PackOptions:
    """Return the options of a finished pack of 12 images in two shards."""
    names = [f"{name}/{at}.jpg" for name in ("ant", "bee") for at in range(6)]
    tree = make_tree(tmp_path / "tree", {name: jpeg(at) for at, name in enumerate(names)})
    options = options_of(tree, tmp_path / "out", SplitOptions(labeled="4", shards=2))
    with open_out_folder(options.out) as folder:
        write_shards(plan_work(options), options.image)
        publish_pack(folder, 0.0)
    return options


def look(options: PackOptions) -> tuple[dict[str, Any], list[str]]:
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
    assert refusal(packed) in [
        f"its source changed after it was packed (images of {name}); {REMEDY}"
        for name in (FIRST, SECOND)
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
        lambda stored: stored["shards"][0].update(file="../train.rec"),
        lambda stored: stored["shards"].pop(),
    ],
)
def test_damaged_manifest(packed: PackOptions, edit: Callable[[dict[str, Any]], object]) -> None:
    change(packed, edit)
    assert refusal(packed).startswith("holds a damaged pack (")
    (packed.out / "manifest.json").unlink()
    assert refusal(packed) == f"holds classes.txt of an unknown pack; {REMEDY}"


@pytest.mark.parametrize("kind", ["crc32", "sha256"])  # that of earlier versions
def test_broken_shards_are_named_and_have_to_be_what_they_were(
    packed: PackOptions, kind: str
) -> None:
    first, second = (packed.out / name for name in (FIRST, SECOND))
    content = first.read_bytes()
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    first.write_bytes(content[:-4])
    assert look(packed)[1] == [FIRST]
    second.unlink()
    assert look(packed)[1] == [FIRST, SECOND]
    first.write_bytes(content[::-1])  # only sizes are compared
    manifest, broken = look(packed)
    assert broken == [SECOND]
    if kind == "sha256":
        for shard in manifest["shards"]:
            del shard["crc32"]
            shard["sha256"] = sums[shard["file"]]
    with open_out_folder(packed.out) as folder:
        write_shards(plan_work(packed))
        for name in (FIRST, SECOND):
            require_same(folder, manifest, broken)  # FIRST was not broken
            (folder.work / name).write_bytes((folder.work / name).read_bytes()[::-1])
        with pytest.raises(OutputError, match=f"{SECOND}, packed again, is not what it was; "):
            require_same(folder, manifest, broken)


def test_changes() -> None:
    assert changed_options({"a": 1, "b": None}, {"a": 1, "b": None}) == ""
    assert changed_options({"a": 1}, {"a": 2, "b": "x"}) == "a was 1, now 2, b was None, now x"
