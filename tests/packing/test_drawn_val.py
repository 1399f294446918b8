"""`pack --val 25%`: validation images drawn from those of --src, in no other split, for good."""

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mpl_fast.errors import ConfigError
from mpl_fast.packing.plan.choose_labeled import choose_val
from mpl_fast.packing.resplit import resplit
from tests.packing.packs import (
    hashes,
    image_tree,
    jpeg,
    make_tree,
    manifest_of,
    pack,
    read_split,
    refuse,
    run,
    verified,
)
from tests.packing.test_choose_labeled import Images, images_of, rows_of
from tests.packing.test_resplit import contents, options


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/ of three classes of 8; the val/ beside it is not used."""
    return image_tree(tmp_path)


def pack_drawn(tree: Path, out: Path, *more: object) -> Path:
    return pack("--src", tree / "train", "--val", "25%", *more, "--shards", 2, out=out)


def keys_of(out: Path, stem: str) -> set[str]:
    return {key for _, _, key, _ in read_split(out, stem)}


def drawn(images: Images, how: str, seed: int = 0, kept: frozenset[int] = frozenset()) -> set[str]:
    with rows_of([image for image in images if image[0] not in kept]) as rows:
        ids = set(choose_val(rows, how, seed=seed, kept=len(kept)))
    return {f"{class_name}/{name}" for at, class_name, name in images if at in ids}


def test_draw_is_the_first_of_each_class_by_keyed_hash() -> None:
    images = images_of({"ant": 20, "bee": 40})
    expected = {
        f"{name}/{file}"
        for name, count in (("ant", 20), ("bee", 40))
        for file in sorted(
            (f"{name}_{number}.jpg" for number in range(count)),
            key=lambda file: hashlib.sha256(f"val:3:{name}/{file}".encode()).hexdigest(),
        )[: count // 5]
    }
    assert drawn(images, "20%", 3) == drawn(images[::-1], "12", 3) == expected
    assert drawn(images, "20%", 4) != expected


def test_draw_follows_the_sizes_nests_and_leaves_an_image_of_each_class() -> None:
    images = images_of({"a": 200, "b": 61, "c": 10, "d": 1, "e": 1})
    draws = [drawn(images, how) for how in ("5", "10%", "100", "90%", "268")]
    assert [len(draw) for draw in draws] == [5, 27, 100, 246, 268]
    assert all(small <= large for small, large in itertools.pairwise(draws))
    counts = [Counter(key[0] for key in draw) for draw in draws]
    assert counts[1]["a"] in (19, 20) and counts[1]["b"] in (6, 7) and counts[1]["c"] == 1
    assert counts[-1] == {"a": 199, "b": 60, "c": 9}
    kept = frozenset(at for at, name, _ in images if name == "a")
    assert drawn(images, "10%", kept=kept) <= {key for key in draws[-1] if key[0] != "a"}
    assert len(drawn(images, "10%", kept=kept)) == 27  # a share of all
    with pytest.raises(
        ConfigError, match=r"at most 69 can be drawn: .* besides the 200 of --label"
    ):
        drawn(images, "50%", kept=kept)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("which", ["all", "rest"])
def test_drawn_images_are_in_no_other_split(
    tree: Path, tmp_path: Path, layout: str, which: str
) -> None:
    # A pool of everything: its files in train/ are those of --src, drawn ones too.
    more = ("--unlabeled-src", tree, "--labeled", "50%", "--unlabeled", which, "--layout", layout)
    out = pack_drawn(tree, tmp_path / "out", *more)
    val, labeled, unlabeled = (
        keys_of(out, f"{a}") for a in ("val", "train_label", "train_unlabel")
    )
    assert Counter(key[:3] for key in val) == {"ant": 2, "bee": 2, "cat": 2}
    assert Counter(key[:3] for key in labeled) == {"ant": 3, "bee": 3, "cat": 3}  # half of the rest
    everything = {f"{path.parent.name}/{path.name}" for path in (tree / "train").glob("*/*")}
    pool = {f"val/{path.parent.name}/{path.name}" for path in (tree / "val").glob("*/*")}
    assert unlabeled == everything - val - (labeled if which == "rest" else set()) | pool
    assert not val & labeled and val | labeled < everything
    stored = manifest_of(out)
    assert [source["images"] for source in stored["sources"]] == [24, 6]
    assert [source.get("unlabeled") for source in stored["sources"]] == [None, True]
    assert (stored["options"]["val"], stored["options"]["val_seed"]) == ("25%", 0)
    assert not verified(out, deep=True).problems
    image = run("extract", out, sorted(val)[0], "--to", tmp_path / "image", "--json").stdout
    assert json.loads(image)["splits"] == ["val"]
    assert "val 25%, " in run("info", out).stdout


def test_seeds_parts_and_dry_run(tree: Path, tmp_path: Path) -> None:
    out = pack_drawn(tree, tmp_path / "out", "--labeled", 3)
    other = pack_drawn(tree, tmp_path / "other", "--labeled", 3, "--val-seed", 1)
    assert keys_of(other, "val") != keys_of(out, "val")
    seed = pack_drawn(tree, tmp_path / "seed", "--labeled", 3, "--split-seed", 1)
    assert keys_of(seed, "train_label") != keys_of(out, "train_label")
    assert read_split(seed, "val") == read_split(out, "val")
    args = ("--src", tree / "train", "--val", "25%", "--labeled", 3, "--shards", 2, "--out")
    for part in ("2/2", "1/2"):
        run("pack", *args, tmp_path / "parts", "--part", part)
    run("finish", tmp_path / "parts")
    assert hashes(tmp_path / "parts") == hashes(out)
    assert "already complete" in run("pack", *args, out).stdout
    assert "val_seed was 0, now 2" in refuse(*args, out, "--val-seed", 2, status=3)
    planned = json.loads(run("pack", *args, tmp_path / "no", "--dry-run", "--json").stdout)
    assert planned["splits"]["val"]["records"] == 6


def test_resplit_keeps_the_drawn_images(tree: Path, tmp_path: Path) -> None:
    out = pack_drawn(tree, tmp_path / "out", "--labeled", 3)
    val = {path.name: path.read_bytes() for path in out.glob("val*")}
    changed: dict[str, Any] = {"labeled": "50%", "split_seed": 7, "unlabeled": "rest"}
    resplit(out, changed)
    assert {path.name: path.read_bytes() for path in out.glob("val*")} == val
    assert contents(out) == contents(pack_drawn(tree, tmp_path / "other", *options(changed)))
    key = sorted(keys_of(out, "val"))[0]
    (tmp_path / "names.txt").write_text(f"{key}\n")
    fault = refuse(out, "--labeled", tmp_path / "names.txt", status=4, command="resplit")
    assert f"1 name fits no image: {key} (--val 25% has taken images, which stay" in fault


def test_images_listed_as_labeled_are_not_drawn(tree: Path, tmp_path: Path) -> None:
    usual = keys_of(pack_drawn(tree, tmp_path / "usual", "--labeled", 3), "val")
    (tmp_path / "names.txt").write_text("\n".join(usual))
    out = pack_drawn(tree, tmp_path / "out", "--labeled", tmp_path / "names.txt")
    assert keys_of(out, "train_label") == usual
    assert len(keys_of(out, "val")) == 6 and not keys_of(out, "val") & usual


def test_classes_without_a_drawn_image_are_named(tree: Path, tmp_path: Path) -> None:
    make_tree(tree / "train", {"dog/0.jpg": jpeg(1), "elk/0.jpg": jpeg(2)})
    args = ("--src", tree / "train", "--labeled", "all", "--out", tmp_path / "out", "--val")
    done = run("pack", *args, "25%")
    assert "warning: --val 25%: has no image of 2 classes: dog, elk\n" in done.stderr
    assert manifest_of(tmp_path / "out")["splits"]["val"]["records"] == 6


@pytest.mark.parametrize(
    ("val", "more", "message"),
    [
        ("0%", (), "--val 0%: that is 0 images, the source has 24"),
        ("1%", (), "--val 1%: that is 0 images, the source has 24"),
        ("0", (), "--val 0: that is 0 images, the source has 24"),
        ("100%", (), "at most 21 can be drawn: every class keeps one for training"),
        ("22", (), "--val 22: that is 22 images, but at most 21 can be drawn"),
        ("25", (), "--val 25: that is 25 images, the source has 24"),
        ("5.5.5%", (), "--val 5.5.5%: not a share such as 10%"),
        ("9" * 5000, (), "9: not a share such as 10%"),
        ("5%x", (), "5%x: no such folder or file"),
        ("5%", ("--val-labels", "labels.txt"), "labels.txt: there is no --val that needs them"),
        ("val", ("--val-seed", 1), "--val-seed 1: is that of a drawn --val, such as 5%"),
        ("7", (), "--val 7: a number of images, or what is called 7 here? Write ./7 for that"),
    ],
)
def test_refused(tree: Path, val: str, more: tuple[object, ...], message: str) -> None:
    make_tree(tree, {"7/ant/0.jpg": jpeg(1)})
    args = ("pack", "--src", "train", "--val", val, *more, "--labeled", 3, "--out", "out")
    status = 4 if "such folder" in message else 2
    assert message in run(*args, folder=tree, status=status).stderr
    assert not list((tree / "out").glob("*.rec"))


def test_a_folder_named_as_a_number(tree: Path) -> None:
    (tree / "val").rename(tree / "7")
    args = ("--src", "train", "--val", "./7", "--labeled", 3, "--out", "out")
    assert "val: 6 records, 2 a class" in run("pack", *args, folder=tree).stdout
