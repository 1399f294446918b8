"""tools/make_rec.py from every kind of source, and with every way to choose the labeled images."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from tests.packing.packs import CLASSES, jpeg, image_tree, manifest_of, pack, read_split, run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path)


def images_of(out: Path, stem: str = "train") -> dict[str, bytes]:
    return {key: image for _, _, key, image in read_split(out, stem)}


def images_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*.*") if path.is_file())
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def nested_tar(path: Path, folder: Path) -> Path:
    """Write an archive with a tar for each class, as ILSVRC2012_img_train.tar."""
    with tarfile.open(path, "w") as outer:
        for name in CLASSES:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for file in sorted((folder / name).iterdir()):
                    inner.add(file, file.name)
            item = tarfile.TarInfo(f"{name}.tar")
            item.size = len(buffer.getvalue())
            outer.addfile(item, io.BytesIO(buffer.getvalue()))
    return path


def flat_tar(path: Path, folder: Path) -> tuple[Path, Path]:
    """Write an archive with images in no folder, and the file with a class for each."""
    files = sorted(folder.rglob("*.jpg"), key=lambda file: (file.name, file.parent.name))
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            tar.add(file, f"ILSVRC2012_val_{number:08}.JPEG")
    labels = path.with_name("validation_labels.txt")
    labels.write_text("".join(f"{file.parent.name}\n" for file in files))
    return path, labels


def test_nested_archive_and_flat_validation(tree: Path, tmp_path: Path) -> None:
    archive = nested_tar(tmp_path / "train.tar", tree / "train")
    val, labels = flat_tar(tmp_path / "val.tar", tree / "val")
    out = pack("--src", archive, "--val", val, "--val-labels", labels, "--labeled", 6,
               "--shards", 2, out=tmp_path / "out")  # fmt: skip
    folder = pack("--src", tree / "train", "--val", tree / "val", "--labeled", 6, "--shards", 2,
                  out=tmp_path / "folder")  # fmt: skip
    # Wherever the images come from, the records are the same.
    for name in ("train-00000-of-00002.rec", "train-00001-of-00002.rec", "train_label.idx"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    rows = read_split(out, "val")
    assert sorted((CLASSES[int(row[1])], row[3]) for row in rows) == sorted(
        (key.partition("/")[0], image) for key, image in images_in(tree / "val").items()
    )
    assert all(row[2].partition("/")[2].startswith("ILSVRC2012_val_") for row in rows)


def test_list_and_records(tree: Path, tmp_path: Path) -> None:
    train = tree / "train"
    files = sorted(path for path in train.rglob("*.*") if path.is_file())
    lines = [
        f"{number}\t{2 - CLASSES.index(path.parent.name)}\ttrain/{path.parent.name}/{path.name}\n"
        for number, path in enumerate(files)
    ]
    (tmp_path / "train.lst").write_text("".join(lines))
    out = pack("--src", tmp_path / "train.lst", "--root", tree, "--labeled", 6,
               "--order", "list", out=tmp_path / "out")  # fmt: skip
    assert images_of(out) == images_in(train)
    # The list's labels are kept, and with them the order of the classes.
    assert (out / "classes.txt").read_text() == "cat\nbee\nant\n"
    keys = [row[2] for row in read_split(out, "train")]
    assert keys == sorted(keys, key=lambda key: ("cat bee ant".index(key[:3]), key))
    again = pack("--src", out / "train.rec", "--labeled", 6, "--shards", 3, out=tmp_path / "again")
    assert (again / "classes.txt").read_text() == "cat\nbee\nant\n"
    assert images_of(again) == images_of(out)
    assert {(row[1], row[2]) for row in read_split(again, "train")} == {
        (row[1], row[2]) for row in read_split(out, "train")
    }
    # The draw is by names, so it is the same; the record of two parts is again one.
    assert set(images_of(again, "train_label")) == set(images_of(out, "train_label"))
    assert sum(shard["multipart"] for shard in manifest_of(again)["shards"]) == 1


def test_numbers_that_mean_other_classes_are_refused(tmp_path: Path) -> None:
    for label in range(12):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        for number in range(2):
            image = jpeg(100 * label + number)
            (tmp_path / "train" / str(label) / f"{number}.jpg").write_bytes(image)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.jpg").write_bytes(jpeg(9999))
    # im2rec numbers the folders in the order of their names: 0, 1, 10, 11, 2, ...
    for label, status in ((0, 0), (11, 4)):
        lines = "".join(f"{row}\t{row}\tv{row}.jpg\n" for row in range(12))
        for row in range(12):
            (tmp_path / "val" / f"v{row}.jpg").write_bytes(jpeg(5000 + row))
        listed = tmp_path / "val.lst"
        listed.write_text(lines if label else "0\t0\tv0.jpg\n")
        common = ("--src", tmp_path / "train", "--val", listed, "--root", tmp_path / "val",
                  "--labeled", 12, "--out", tmp_path / f"out{label}")  # fmt: skip
        done = run("pack", *common, status=status)
    assert "its labels are numbers, and so are the names of the training classes" in done.stderr
    assert "(class 10 has label 2)" in done.stderr


def test_several_sources_are_joined(tree: Path, tmp_path: Path) -> None:
    more = tmp_path / "more" / "bee"
    more.mkdir(parents=True)
    (more / "new.jpg").write_bytes(jpeg(77))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tree, "tree")
    out = pack("--src", f"{tmp_path}/all.tar:tree/train", more.parent, "--labeled", 6,
               "--val", f"{tmp_path}/all.tar:tree/val", out=tmp_path / "out")  # fmt: skip
    assert images_of(out) == images_in(tree / "train") | {"bee/new.jpg": jpeg(77)}
    assert images_of(out, "val") == images_in(tree / "val")
    assert [source["images"] for source in manifest_of(out)["sources"]] == [24, 1, 6]


def test_small_draw_is_part_of_a_larger_one(tree: Path, tmp_path: Path) -> None:
    draws = {}
    for share in ("12.5%", "25%"):
        out = pack("--src", tree / "train", "--labeled", share, "--unlabeled", "rest",
                   out=tmp_path / share)  # fmt: skip
        draws[share] = set(images_of(out, "train_label"))
        unlabeled = set(images_of(out, "train_unlabel"))
        assert unlabeled == set(images_of(out)) - draws[share]
    assert (len(draws["12.5%"]), len(draws["25%"])) == (3, 6)
    assert draws["12.5%"] < draws["25%"]
    for number in range(8, 32):
        (tree / "train" / "ant" / f"{number}.jpg").write_bytes(jpeg(number))
    out = pack("--src", tree / "train", "--labeled", "25%", "--balance", "proportional",
               out=tmp_path / "proportional")  # fmt: skip
    counts = Counter(key[:3] for key in images_of(out, "train_label"))
    assert counts == {"ant": 8, "bee": 2, "cat": 2}


def test_listed_labeled_images(tree: Path, tmp_path: Path) -> None:
    for name in CLASSES:  # base names that tell the class, as ImageNet's
        for path in (tree / "train" / name).iterdir():
            path.rename(path.with_name(f"{name}_{path.name}"))
    (tmp_path / "10percent.txt").write_text("ant_3.jpg\nbee_1.jpg\ncat_1.JPEG\n")
    (tmp_path / "wnid.txt").write_text("ant/ant_3.jpg 0\nbee/bee_1.jpg 1\ncat/cat_1.JPEG 2\n")
    for name in ("10percent.txt", "wnid.txt"):
        out = pack("--src", tree / "train", "--labeled", tmp_path / name, out=tmp_path / f"o{name}")
        keys = set(images_of(out, "train_label"))
        assert keys == {"ant/ant_3.jpg", "bee/bee_1.jpg", "cat/cat_1.JPEG"}
    (tmp_path / "bad.txt").write_text("ant_3.jpg\nbee_1.jpg\ncat_1.JPEG\ndog_1.jpg\n")
    done = run("pack", "--src", tree / "train", "--labeled", tmp_path / "bad.txt",
               "--out", tmp_path / "bad", status=4)  # fmt: skip
    assert "bad.txt: 1 names fit no image: dog_1.jpg" in done.stderr
    assert not (tmp_path / "bad").exists()
