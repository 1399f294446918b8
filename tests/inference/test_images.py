"""What is listed and read for predictions is what the sources of packing hold."""

import hashlib
from pathlib import Path

import pytest

from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import DataError
from mpl_fast.inference.images import Images, open_images
from tests.packing.packs import jpeg, make_records, make_tar, make_tree, pack
from tests.packing.test_containers import FORMS, made_files, write

FILES = made_files()


def listed(spec: Path | str, work: Path) -> Images:
    work.mkdir(exist_ok=True)
    return open_images(str(spec), work, print)


@pytest.mark.parametrize("form", ["folder", "tar", "rec", *FORMS])
def test_images_of_a_source(form: str, tmp_path: Path) -> None:
    source: Path | str = tmp_path / "data"
    if form == "folder":
        make_tree(tmp_path / "data", FILES)
    elif form == "tar":
        source = make_tar(tmp_path / "data.tar", FILES.items())
    elif form == "rec":
        rows = ((0, number, image) for number, image in enumerate(FILES.values()))
        source = make_records(tmp_path / "data.rec", rows)
    else:
        source = write(form, tmp_path / form, FILES)
    images = listed(source, tmp_path / "work")
    places = range(len(images.names))
    assert sorted(map(images.read, places)) == sorted(FILES.values())
    if form in ("folder", "tar", "zip"):
        assert {name: images.read(place) for place, name in enumerate(images.names)} == FILES
        assert [*images.known] == [name.partition("/")[0] for name in images.names]
    if form == "folder":
        assert [*images.names] == sorted(FILES)
    again = listed(source, tmp_path / "work")
    assert again.content == images.content


def test_a_changed_image_changes_the_content(tmp_path: Path) -> None:
    make_tree(tmp_path / "data", FILES)
    before = listed(tmp_path / "data", tmp_path).content
    (tmp_path / "data/ant/y.jpg").write_bytes(jpeg(77))
    assert listed(tmp_path / "data", tmp_path).content != before


def test_one_image(tmp_path: Path) -> None:
    make_tree(tmp_path / "ant", {"x.jpg": jpeg(1), "no_suffix": jpeg(2)})
    for name, image in (("x.jpg", jpeg(1)), ("no_suffix", jpeg(2))):
        images = listed(tmp_path / "ant" / name, tmp_path)
        assert [images.read(0), *images.names, *images.known] == [image, name, "ant"]


def test_splits_of_a_pack(tmp_path: Path) -> None:
    """Which images keep their label, and whether a labels file has to list these."""
    tree = make_tree(tmp_path / "tree", FILES)
    alone = pack("--src", tree, "--labeled", 6, out=tmp_path / "alone")
    pool = make_tree(tmp_path / "pool", {f"{at}.jpg": jpeg(900 + at) for at in range(3)})
    with_pool = pack("--src", tree, "--unlabeled-src", pool, out=tmp_path / "with_pool")
    images = listed(alone, tmp_path)
    assert {*images.names} == {*FILES} and len(images.labels) == 6
    assert images.labeled == images.labels.keys()
    assert all(name.startswith(f"{label}/") for name, label in images.labels.items())
    assert {hashlib.md5(images.read(at)).digest() for at in range(40)} == {
        hashlib.md5(image).digest() for image in FILES.values()
    }
    images = listed(f"{with_pool}:unlabeled", tmp_path)
    assert {*images.names} - {*images.labeled} == {"0.jpg", "1.jpg", "2.jpg"}
    assert not images.labels
    assert len(listed(f"{with_pool}:labeled", tmp_path).names) == 40
    splits = ", ".join(read_manifest(alone).splits)
    with pytest.raises(DataError, match=f"has no split 'val': give {splits}"):
        listed(f"{alone}:val", tmp_path)
