"""One set of images in every container: the same records, however they are packed; and damage."""

import hashlib
import json
import random
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from tests.packing.made_sources import content, opened
from tests.packing.packs import (
    hashes,
    jpeg,
    make_tar,
    make_tree,
    pack,
    png,
    read_split,
    refuse,
    run,
)

FORMS = ("parquet", "webdataset", "zip")


def write_parquet(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write class/name and content as two parquet files of several row groups."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    classes = sorted({key.partition("/")[0] for key in files})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": classes}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [*files.items()]
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = [{"bytes": data, "path": key.partition("/")[2]} for key, data in part]
        labels = [classes.index(key.partition("/")[0]) for key, _ in part]
        table = pa.table({"image": pa.array(images, kind), "label": labels})
        file = folder / f"train-0000{number}-of-00002.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=7 + half // 9)
    return f"{folder}/train-*.parquet"


def write_webdataset(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write shards of a third each, with a .cls for each image."""
    rows = [*files.items()]
    step = -(-len(rows) // 3)
    for number in range(3):
        members: list[tuple[str, bytes]] = []
        for key, data in rows[step * number : step * (number + 1)]:
            class_name, name = key.split("/")
            members += [(name, data), (f"{name.rpartition('.')[0]}.cls", class_name.encode())]
        make_tar(folder / f"shard-{number:06}.tar", members)
    return f"{folder}/shard-{{000000..000002}}.tar"


def write_zip(folder: Path, files: Mapping[str, bytes]) -> str:
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in files.items():
            archive.writestr(f"train/{key}", data)
    return f"{folder / 'data.zip'}:train"


def write(form: str, folder: Path, files: Mapping[str, bytes]) -> str:
    """Write class/name and content; return the source."""
    folder.mkdir()
    writers = {"parquet": write_parquet, "webdataset": write_webdataset, "zip": write_zip}
    return writers[form](folder, files)


def made_files() -> dict[str, bytes]:
    """Return 40 images, all of one size when stored."""
    files = {
        f"{name}/{name}_{at}.jpg": jpeg(50 * at + len(name))
        for name in ("bee", "cobra")
        for at in range(19)
    }
    return files | {"ant/x.png": png(0), "ant/y.jpg": png(1)}


@pytest.mark.parametrize("form", FORMS)
def test_same_records_as_a_tar(tmp_path: Path, form: str) -> None:
    files = made_files()
    tar = make_tar(tmp_path / "data.tar", files.items())
    source = write(form, tmp_path / form, files)
    how = ("--labeled", 6)
    one = hashes(pack("--src", tar, *how, out=tmp_path / "one"))
    other = hashes(pack("--src", source, *how, out=tmp_path / "other"))
    differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differ == {"manifest.json", "records.sqlite"}  # the sources


@pytest.mark.parametrize("form", FORMS)
def test_parts_and_processes(tmp_path: Path, form: str) -> None:
    """The same bytes from one process without threads, from two, and from parts."""
    source = write(form, tmp_path / form, made_files())
    how = ("--src", source, "--labeled", 6, "--shards", 3)
    one = pack(*how, "--read-threads", 0, out=tmp_path / "one")
    two = pack(*how, "-j", 2, out=tmp_path / "two", pool=form == "webdataset")
    parts = tmp_path / "parts"
    for number in (2, 1):
        run("pack", *how, "--out", parts, "--part", f"{number}/2")
    run("finish", parts)
    assert hashes(one) == hashes(two) == hashes(parts)
    run("verify", one, "--deep", "-j", 1)


def pool_images(source: str, tmp_path: Path) -> set[bytes]:
    """Pack a source as unlabeled images beside two labeled ones; return them."""
    tree = make_tree(tmp_path / "tree", {"ant/1.jpg": jpeg(9001), "bee/2.jpg": jpeg(9002)})
    out = pack("--src", tree, "--unlabeled-src", source, out=tmp_path / "out")
    run("verify", out, "--deep", "-j", 1)
    rows = read_split(out, "train_unlabel")
    assert {label for _, label, key, _ in rows if key not in ("ant/1.jpg", "bee/2.jpg")} == {-1}
    assert (out / "classes.txt").read_text().split() == ["ant", "bee"]
    return {image for *_, image in rows} - {jpeg(9001), jpeg(9002)}


@pytest.mark.parametrize("form", FORMS)
def test_unlabeled_source(tmp_path: Path, form: str) -> None:
    files = made_files()
    assert pool_images(write(form, tmp_path / form, files), tmp_path) == {*files.values()}


@pytest.mark.parametrize("column", ["none", "null", "minus one", "list"])
def test_unlabeled_parquet(tmp_path: Path, column: str) -> None:
    """Without labels, or with those that would be refused."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = [*made_files().values()]
    labels = {
        "null": pa.nulls(len(files), pa.int64()),
        "minus one": [-1] * len(files),
        "list": [[1, 2]] * len(files),
    }
    columns = {"image": pa.array(files)} | ({"label": labels[column]} if column in labels else {})
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert pool_images(f"{tmp_path}/x.parquet", tmp_path) == {*files}


@pytest.mark.parametrize("shards", ["", "[01]"])
def test_unlabeled_tars_without_labels(tmp_path: Path, shards: str) -> None:
    rows = [*made_files().items()]
    make_tar(tmp_path / "0.tar", [(name.replace("/", "-"), data) for name, data in rows[:20]])
    make_tar(tmp_path / "1.tar", [(name.replace("/", "-"), data) for name, data in rows[20:]])
    wanted = rows if shards else rows[:20]
    found = pool_images(f"{tmp_path}/{shards or 0}.tar", tmp_path)
    assert found == {data for _, data in wanted}


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_no_label_in_some(tmp_path: Path, form: str) -> None:
    """-1 is the label of an image without one, as in lists and records."""
    images = {number: jpeg(number) for number in range(9)}
    labels = {number: max(-1, number - 5) for number in images}
    if form == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.table({"image": pa.array([*images.values()]), "label": [*labels.values()]})
        pq.write_table(table, source := tmp_path / "x.parquet")
    else:
        rows = []
        for number, image in images.items():
            rows += [(f"{number}.jpg", image), (f"{number}.cls", str(labels[number]).encode())]
        source = make_tar(tmp_path / "x.tar", rows)
    done = run("pack", "--src", source, "--labeled", "all", "--out", tmp_path / "out")
    assert "5 images have no label (-1): unlabeled images only" in done.stderr
    found = {image: label for _, label, _, image in read_split(tmp_path / "out", "train_unlabel")}
    assert found == {image: labels[number] for number, image in images.items()}
    again = ("--src", source, "--unlabeled-src", source, "--out", tmp_path / "two")
    assert "all its images are other sources': leave it out" in refuse(*again, status=4)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_same_images_as_imagenet_1000(tmp_path: Path, shared_data: Path, form: str) -> None:
    files = dict(real_files(shared_data / "imagenet-1000.tar"))
    wanted = {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}
    assert len(wanted) == 1000
    source = write(form, tmp_path / form, files)
    out = pack("--src", source, "--labeled", 1000, "--check", "header", out=tmp_path / "out")
    rows = read_split(out, "train")
    assert {key: hashlib.sha256(image).hexdigest() for *_, key, image in rows} == wanted


def real_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for item in tar:
            if item.isfile() and (stream := tar.extractfile(item)) is not None:
                yield "/".join(item.name.split("/")[-2:]), stream.read()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_damage_never_raises_anything_else(tmp_path: Path, form: str) -> None:
    """A byte is changed: the images are listed, or it is refused with a line."""
    seeded = random.Random(0)
    source = write(form, tmp_path / "in", made_files())
    file = sorted((tmp_path / "in").iterdir())[0]
    whole = file.read_bytes()
    outcomes = {"listed": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        # Heads and the footer of parquet are worth more than images.
        start = seeded.choice([0, len(data) - 2000, seeded.randrange(len(data))])
        data[min(len(data) - 1, start + seeded.randrange(2000))] = seeded.randrange(256)
        file.write_bytes(data)
        try:
            opened_source = opened(source, tmp_path, report=lambda line: None)
            for image in opened_source.images():
                content(opened_source, image)
            outcomes["listed"] += 1
        except DataError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        for spool in tmp_path.glob("spool-*"):
            spool.unlink()
    assert min(outcomes.values()) > 20, outcomes
