"""tools/make_rec.py on images that are damaged, odd or too large: refused, left out or changed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from tests.packing.packs import (
    hashes,
    jpeg,
    image_tree,
    manifest_of,
    pack,
    png,
    read_split,
    refuse,
    run,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def damage(train: Path) -> dict[str, str]:
    """Damage images in many ways; return a part of each one's reason."""
    whole = (train / "ant" / "7.jpg").read_bytes()
    large = jpeg(0, 100)
    picture = png(3)
    faults = {
        "ant/0.jpg": (b"", "empty file"),
        "ant/1.jpg": (whole[: len(whole) // 2], "cut short"),
        "ant/2.jpg": (b"words", "neither JPEG nor PNG"),
        "ant/3.jpg": (large[: len(large) // 2] + large[-2:], "Corrupt JPEG data"),
        "bee/1.jpg": (b"GIF89a" + bytes(50), "GIF"),
        "cat/2.png": (picture[:-20], "cut short"),
        "cat/3.jpg": (picture[:60] + bytes(4) + picture[64:], "damaged PNG chunk at byte 33"),
    }
    for key, (content, _) in faults.items():
        (train / key).write_bytes(content)
    return {key: reason for key, (_, reason) in faults.items()}


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_skipped_labeled_images_are_told(tree: Path, tmp_path: Path, layout: str) -> None:
    common = ("--src", tree / "train", "--labeled", "3", "--layout", layout)
    drawn = read_split(pack(*common, out=tmp_path / "sound"), "train_label")[0][2]
    (tree / "train" / drawn).write_bytes(b"words")
    done = run("pack", *common, "--on-bad", "skip", "--out", tmp_path / "out")
    assert (
        "warning: 1 of the 3 labeled images were left out as bad; a class has none" in done.stderr
    )
    assert "1 images were skipped" in done.stdout


def test_many_faulty_images_have_a_line_each(tree: Path, tmp_path: Path) -> None:
    bad = [tree / "train" / "ant" / f"bad{number:02d}.jpg" for number in range(15)]
    for path in bad:
        path.write_bytes(b"words")
    common = ("--src", tree / "train", "--out", tmp_path / "out", "--labeled", "6")
    done = run("pack", *common, status=4)
    *each, last = done.stderr.splitlines()
    assert [line.split(": ")[2] for line in each] == list(map(str, bad))
    assert "error: 15 images cannot be used" in last
    assert " and 5 more; repair or remove them" in last


def test_faulty_images_are_all_named(tree: Path, tmp_path: Path) -> None:
    train, val, out = tree / "train", tree / "val", tmp_path / "out"
    faults = damage(train)
    (val / "ant" / "0.jpg").write_bytes(b"words")
    common = ("--src", train, "--val", val, "--out", out, "--labeled", "12", "--layout", "separate")
    line = refuse(*common, status=4)
    # Once each, although the labeled images are in two files.
    head, _, rest = line.partition(" nothing was published: ")
    assert head.endswith("error: 8 images cannot be used,")
    listed, _, advice = rest.rpartition("; ")
    named = dict(part.split(": ", 1) for part in listed.split("; "))
    assert list(named) == [*(str(train / key) for key in faults), str(val / "ant" / "0.jpg")]
    for key, reason in faults.items():
        assert reason in named[str(train / key)]
    assert advice == (
        "repair or remove them, or leave them out with --on-bad skip, which keeps every "
        "finished shard"
    )
    assert not out.exists()
    # Looking only at the ends misses what is wrong in the middle, and nothing else.
    line = refuse(*common, "--check", "header", status=4)
    assert "6 images cannot" in line
    assert "ant/3.jpg" not in line
    assert "cat/3.jpg" not in line
    line = refuse(*common, "--check", "none", status=4)
    assert f"1 images cannot be used, nothing was published: {train}/ant/0.jpg: empty file" in line


def test_long_list_of_faults_is_cut(tree: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tree / "train" / "ant" / f"x{number}.jpg").write_bytes(b"words")
    line = refuse("--src", tree / "train", "--out", tmp_path / "out", "--labeled", "6", status=4)
    assert "12 images cannot be used" in line
    assert " and 2 more; repair" in line
    assert line.count("neither JPEG nor PNG") == 10


def test_skip_leaves_gaps_and_says_so(tree: Path, tmp_path: Path) -> None:
    train, out = tree / "train", tmp_path / "out"
    faults = damage(train)
    common = ("--src", train, "--labeled", "12", "--shards", 2, "--out", out)
    done = run("pack", *common, "--on-bad", "skip")
    assert "7 images were skipped; the manifest names them" in done.stdout
    rows = read_split(out, "train")
    assert len(rows) == 24 - 7
    assert not {row[2] for row in rows} & faults.keys()
    assert all(image == (train / key).read_bytes() for _, _, key, image in rows)
    ids = [row[0] for row in rows]
    assert ids == sorted(ids)
    assert set(ids) < set(range(24))  # an id is a place in the plan
    stored = manifest_of(out)
    assert {remark["image"]: remark["source"] for remark in stored["bad"]} == {
        key: str(train / key) for key in faults
    }
    for remark in stored["bad"]:
        assert remark["action"] == "skipped"
        assert faults[remark["image"]] in remark["reason"]
    assert stored["splits"]["train"]["records"] == stored["totals"]["images"] == 17
    assert "already complete" in run("pack", *common, "--on-bad", "skip").stdout
    # What was left out is not passed over in silence by a run that was not told to.
    line = refuse(*common, status=3)
    assert "holds a pack that left out 7 images that cannot be used" in line


def test_shard_that_left_images_out_is_no_shard_of_a_strict_pack(
    tree: Path, tmp_path: Path
) -> None:
    (tree / "train" / "ant" / "0.jpg").write_bytes(b"words")
    common = ("--src", tree / "train", "--labeled", "12", "--shards", 2, "--out", tmp_path / "out")
    # Two parts, one packed: all shards of the other are missing, and one of them is finished.
    run("pack", *common, "--on-bad", "skip", "--part", "1/2")
    run("pack", *common, "--on-bad", "skip", "--part", "2/2")
    line = refuse(*common, status=4)
    assert "1 images cannot be used, nothing was published: " in line
    assert "ant/0.jpg: neither JPEG nor PNG" in line
    (tree / "train" / "ant" / "0.jpg").write_bytes(jpeg(1))
    run("pack", *common)
    assert len(read_split(tmp_path / "out", "train")) == 24


def test_convert_keeps_what_can_be_decoded(tree: Path, tmp_path: Path) -> None:
    train = tree / "train"
    large = jpeg(0, 100)
    cut = large[: len(large) // 2]
    (train / "ant" / "3.jpg").write_bytes(cut)
    done = run("pack", "--src", train, "--labeled", 6, "--on-bad", "convert",
               "--out", tmp_path / "out")  # fmt: skip
    bad = {remark["image"]: remark for remark in manifest_of(tmp_path / "out")["bad"]}
    assert {key: remark["action"] for key, remark in bad.items()} == {
        "ant/3.jpg": "converted", "cat/0.jpg": "converted"}  # fmt: skip
    assert bad["cat/0.jpg"]["reason"] == "a PNG named .jpg"
    assert "cut short" in bad["ant/3.jpg"]["reason"]
    assert "2 images were converted; the manifest names them" in done.stdout
    rows = {key: image for _, _, key, image in read_split(tmp_path / "out", "train")}
    assert len(rows) == 24
    shapes = {key: simplejpeg.decode_jpeg(rows[key]).shape for key in bad}
    assert shapes == {"ant/3.jpg": (100, 100, 3), "cat/0.jpg": (9, 7, 3)}
    for key in rows.keys() - bad.keys():
        assert rows[key] == (train / key).read_bytes()
    (train / "ant" / "4.jpg").write_bytes(b"words")
    line = refuse("--src", train, "--labeled", 6, "--on-bad", "convert", "--force",
                  "--out", tmp_path / "out", status=4)  # fmt: skip
    assert "1 images cannot be used" in line
    assert len(read_split(tmp_path / "out", "train")) == 24  # the old pack, untouched


def test_short_side_only_shrinks(tree: Path, tmp_path: Path) -> None:
    train = tree / "train"
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), (96, 64))
    (train / "ant" / "0.jpg").write_bytes(simplejpeg.encode_jpeg(smooth))
    (train / "ant" / "1.jpg").write_bytes(simplejpeg.encode_jpeg(smooth[:, :34]))
    (train / "bee" / "2.png").write_bytes(bytes(cv2.imencode(".png", smooth)[1]))
    common = ("--src", train, "--labeled", 6, "--shards", 3, "--short-side", 32)
    out = pack(*common, "--quality", 80, out=tmp_path / "out")
    rows = {key: image for _, _, key, image in read_split(out, "train")}
    shapes = {key: simplejpeg.decode_jpeg(rows[key]).shape for key in ("ant/0.jpg", "bee/2.png")}
    assert shapes == {"ant/0.jpg": (32, 48, 3), "bee/2.png": (32, 48, 3)}
    shrunk = cv2.resize(smooth, (48, 32), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(simplejpeg.decode_jpeg(rows["ant/0.jpg"]) - shrunk).mean() < 4
    # 34 is less than 1.1 times 32, all others are smaller: their bytes stay.
    for key in rows.keys() - shapes.keys():
        assert rows[key] == (train / key).read_bytes()
    stored = manifest_of(out)
    transform = stored["transform"]
    assert (transform["mode"], transform["short_side"], transform["quality"]) == (
        "short-side", 32, 80)  # fmt: skip
    assert transform["exif_orientation"] == "not applied; dropped where re-encoded"
    assert stored["totals"]["reencoded"] == 2
    assert hashes(pack(*common, "--quality", 80, "-j", 3, out=tmp_path / "two")) == hashes(out)
    better = pack(*common, "--quality", 95, "--min-shrink", 1, out=tmp_path / "better")
    assert manifest_of(better)["totals"]["reencoded"] == 3
    assert (better / "train.lst").read_bytes() == (out / "train.lst").read_bytes()
    line = refuse("--out", out, *common, status=3)
    assert "holds another pack (quality was 80, now 90)" in line
