"""Images of one class and name: each gets a name of its own; one file given twice is refused."""

import os
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.options import SplitOptions
from mpl_fast.packing.sources.source import Image
from tests.packing.made_sources import MadeSource, plan_of
from tests.packing.packs import (
    hashes,
    jpeg,
    make_records,
    make_tar,
    make_tree,
    pack,
    read_split,
    refuse,
    run,
    verified,
)


def made(*paths: str, spec: str = "src") -> MadeSource:
    """Return a source of images whose class is the first part of the path."""
    images = [Image(p.partition("/")[0], p.rpartition("/")[2], p, -1, 10, 7) for p in paths]
    return MadeSource(images, spec)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (  # one source: the path, and the others keep their names
            [made("dog/rex/1.jpg", "dog/fido/1.jpg", "dog/fido/2.jpg")],
            ["dog_rex_1.jpg", "dog_fido_1.jpg", "2.jpg"],
        ),
        (  # equal paths: the source before it
            [made("dog/1.jpg", "dog/2.jpg", spec="x/a"), made("dog/1.jpg", spec="x/b.tar:in/c")],
            ["a_dog_1.jpg", "2.jpg", "c_dog_1.jpg"],
        ),
        (  # of one name: their numbers
            [made("dog/1.jpg", spec="x/a"), made("dog/1.jpg", spec="y/a")],
            ["0_dog_1.jpg", "1_dog_1.jpg"],
        ),
        (  # an image has the new name already
            [made("dog/x/1.jpg", "dog/y/1.jpg", "dog/dog_x_1.jpg")],
            ["src_dog_x_1.jpg", "dog_y_1.jpg", "src_dog_dog_x_1.jpg"],
        ),
        (  # paths that differ in / and _ only
            [made("dog/a/b_c/1.jpg", "dog/a_b/c/1.jpg")],
            ["8f51e9f0bcd56bc7_src_dog_a_b_c_1.jpg", "e0860a1acc043384_src_dog_a_b_c_1.jpg"],
        ),
    ],
)
@pytest.mark.parametrize("order", ["shuffle", "list"])
def test_new_names(tmp_path: Path, sources: list[MadeSource], names: list[str], order: str) -> None:
    """The plan is that of images with these names, in whatever order they are listed."""
    how = SplitOptions(labeled="1", shards=2, order=order)
    left, renamed, mixed = iter(names), [], []
    for source in sources:
        images = [*source.images()]
        named = [image._replace(name=next(left)) for image in images]
        renamed.append(MadeSource(named, source.spec))
        mixed.append(MadeSource(images[::-1], source.spec))
    wanted = plan_of(tmp_path / "plan", renamed, how)
    assert sorted(row.name for row in wanted.rows) == sorted(names)
    for given in (sources, mixed):
        assert vars(plan_of(tmp_path / "plan", given, how)) == vars(wanted)


def test_validation_images(tmp_path: Path) -> None:
    val = made("dog/x/1.jpg", "dog/y/1.jpg", spec="val")
    plan = plan_of(tmp_path / "plan", made("dog/1.jpg"), SplitOptions(labeled="all"), val)
    assert sorted(plan.keys) == ["dog/1.jpg", "dog/dog_x_1.jpg", "dog/dog_y_1.jpg"]


def test_names_with_line_breaks(tmp_path: Path) -> None:
    """A folder that gives no class may have any name until its name is needed."""
    how = SplitOptions(labeled="all")
    assert plan_of(tmp_path / "plan", made("dog/a\tb/1.jpg"), how).keys == ["dog/1.jpg"]
    with pytest.raises(DataError, match=r"src: 'dog/a\\tb/1.jpg' has a tab or line break"):
        plan_of(tmp_path / "plan", made("dog/a\tb/1.jpg", "dog/c/1.jpg"), how)


def test_joined_sources(tmp_path: Path) -> None:
    """Packed, listed, drawn, found and checked by their new names; the same from parts."""
    files = {f"{name}/{at}.jpg": jpeg(at + len(name)) for name in ("dog", "ape") for at in (1, 2)}
    one = make_tree(tmp_path / os.fsdecode(b"caf\xe9"), files)
    other = make_tar(tmp_path / "b.tar", [(key, jpeg(90)) for key in ("dog/1.jpg", "ape/9.jpg")])
    names = tmp_path / "names.txt"
    names.write_text("dog/b.tar_dog_1.jpg\nape/2.jpg\n")
    args = ("--src", one, other, "--labeled", names, "--shards", 2)
    done = run("pack", *args, "--out", tmp_path / "out")
    new = os.fsdecode(b"caf\xe9_dog_1.jpg")
    said = "2 images have the class and name of others: named by their paths, as dog/caf"
    assert said in done.stderr
    out = tmp_path / "out"
    wanted = {key: image for key, image in files.items() if key != "dog/1.jpg"}
    wanted |= {
        f"dog/{new}": files["dog/1.jpg"],
        "dog/b.tar_dog_1.jpg": jpeg(90),
        "ape/9.jpg": jpeg(90),
    }
    assert {key: image for *_, key, image in read_split(out, "train")} == wanted
    labeled = {key for *_, key, _ in read_split(out, "train_label")}
    assert labeled == {"dog/b.tar_dog_1.jpg", "ape/2.jpg"}
    assert not verified(out, deep=True).problems
    printed = run("extract", out, f"dog/{new}", "--to", tmp_path / "x.jpg").stdout
    assert (tmp_path / "x.jpg").read_bytes() == files["dog/1.jpg"]
    assert f"source  {one}/dog/1.jpg\n" in printed
    for part in ("2/2", "1/2"):
        run("pack", *args, "--out", tmp_path / "parts", "--part", part)
    run("finish", tmp_path / "parts")
    assert hashes(tmp_path / "parts") == hashes(out)


def test_one_file_given_twice(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "all", {"x/dog/1.jpg": jpeg(1), "x/dog/2.jpg": jpeg(2)})
    (tmp_path / "link").symlink_to(tree / "x")
    tar = make_tar(tmp_path / "a.tar", [("x/dog/1.jpg", jpeg(1))])
    (tmp_path / "link.tar").symlink_to(tar)
    (tmp_path / "some.lst").write_text("0\t0\tx/dog/1.jpg\n")
    for one, other, count in (
        (tree, tree, "2 of its images are"),
        (tree, tree / "x", "2 of its images are"),
        (tmp_path / "link", tree, "2 of its images are"),
        (tree / "x", f"{tree}/x/", "2 of its images are"),
        (tar, tmp_path / "link.tar", "1 of its images is"),
        (f"{tar}:x", tar, "1 of its images is"),
    ):
        line = refuse("--src", one, other, "--out", tmp_path / "out", status=4)
        assert line.endswith(f"{other}: {count} in {one}, too: give each image once")
    args = ("--src", tree, tmp_path / "some.lst", "--root", tree, "--out", tmp_path / "out")
    assert f"some.lst: 1 of its images is in {tree}, too" in refuse(*args, status=4)
    # Also if its classes there are others: x and dog.
    how = ("--class-from", "top", "--out", tmp_path / "out")
    assert "/x: 2 of its images are in " in refuse("--src", tree, tree / "x", *how, status=4)
    twice = make_tar(tmp_path / "twice.tar", [("dog/1.jpg", jpeg(1))] * 2)
    line = refuse("--src", twice, "--out", tmp_path / "out", status=4)
    assert line.endswith(
        "1 name occurs more than once in one source: dog/1.jpg; keep one image of each"
    )


def test_new_names_are_printed_before_an_error(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "in", {f"dog/{name}/1.jpg": jpeg(1) for name in ("rex", "fido")})
    (tmp_path / "names.txt").write_text("dog/1.jpg\n")
    how = ("--class-from", "top", "--labeled", tmp_path / "names.txt", "--out", tmp_path / "out")
    lines = run("pack", "--src", tree, *how, status=4).stderr.splitlines()
    assert "named by their paths, as dog/dog_fido_1.jpg" in lines[0]
    assert lines[-1].endswith("1 name fits no image: dog/1.jpg")


def test_equal_images_in_other_files_are_counted(tmp_path: Path) -> None:
    """A copy is no file given twice; records have only their ids for names."""
    images = {"dog/1.jpg": jpeg(1), "dog/2.jpg": jpeg(2)}
    tree = make_tree(tmp_path / "tree", images)
    tar = make_tar(tmp_path / "copy.tar", images.items())
    args = ("--labeled", "all", "--out", tmp_path / "out")
    done = run("pack", "--src", tree, tar, *args)
    assert "4 images have the class and name of others" in done.stderr
    assert "4 images are there more than once, in 2 groups" in done.stderr
    files = [make_records(tmp_path / f"{n}.rec", [(0, 7, jpeg(n))]) for n in range(2)]
    out = pack("--src", *files, "--labeled", "all", out=tmp_path / "records")
    found = {key: image for *_, key, image in read_split(out, "train")}
    assert found == {"0/0.rec_7.jpg": jpeg(0), "0/1.rec_7.jpg": jpeg(1)}
