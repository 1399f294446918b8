"""Labels files: which image gets which class, in which sources, and every fault with its line."""

import os
import shlex
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from tests.packing.made_sources import entries, keys, listed
from tests.packing.packs import (
    jpeg,
    make_records,
    make_tar,
    make_tree,
    read_split,
    refuse,
    run,
    verified,
)
from tests.packing.test_lists import write


@pytest.mark.parametrize(
    "text",
    [
        "b.jpg\tbee\na b.jpg\tant one\n",
        "b.jpg,bee\r\n\r\nval/a b.jpg,ant one\r\n",
        "\ufeffant\nbee\n",
        "b.jpg bee\na b.jpg ant",
    ],
)
def test_labels_of_a_flat_folder_and_archive(tmp_path: Path, text: str) -> None:
    contents = {"a b.jpg": b"1", "b.jpg": b"22"}
    labels = write(tmp_path / "labels.txt", text)
    tree = make_tree(tmp_path / "tree", contents)
    archive = make_tar(tmp_path / "v.tar", [(f"val/{name}", one) for name, one in contents.items()])
    ant = "ant one" if "one" in text else "ant"
    for spec in (tree, archive, f"{archive}:val"):
        expected = [(f"{ant}/a b.jpg", b"1"), ("bee/b.jpg", b"22")]
        assert entries(spec, tmp_path, labels=labels) == expected
        source, _ = listed(spec, tmp_path, labels=labels)
        assert (source.warnings, source.class_order) == ([], None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ant\nbee\nant\n", ["ant/01.jpg", "ant/03.jpg", "bee/02.jpg"]),
        ("0\n1\n0\n", ["0/01.jpg", "0/03.jpg", "1/02.jpg"]),  # not the devkit's numbers
        (f"1\n{5000 * '9'}\n2\n", ["1/01.jpg", "2/03.jpg", f"{5000 * '9'}/02.jpg"]),
        ("1\n1001\n2\n", ["1/01.jpg", "1001/02.jpg", "2/03.jpg"]),
        ("1\nn01440764\n2\n", ["1/01.jpg", "2/03.jpg", "n01440764/02.jpg"]),
    ],
)
def test_one_class_a_line_in_the_order_of_names(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    names = ("z/03.jpg", "02.jpg", "y/01.jpg")
    archive = make_tar(tmp_path / "val.tar", ((name, b"-") for name in names))
    labels = write(tmp_path / "labels.txt", text)
    assert keys(listed(archive, tmp_path, labels=labels)[1]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg ant\nant\n", "line 2: 'ant': each line must be `name class`, or each a class"),
        ("ant\na.jpg ant\n", "line 2: 'a.jpg ant': each line must be"),
        ("a.jpg\t\n", "line 1: a.jpg has no class: leave the line out, or write -1 for an unlab"),
        ("a.jpg,ant\n020, \n", "line 2: 020 has no class: leave the line out"),
        ("Id;label\na.jpg;ant\n", "lines are separated by ';': use a comma or a tab$"),
        ("a.jpg;ant\n", "lines are separated by ';'"),
        ("a.jpg,ant\nB.jpg,p\udce2re\n", "not UTF-8: line 2; convert the file$"),
        ("a.jpg\0ant\n", "a text file is needed, with `name class` on each line"),
        ("a.jpg ant\n./a.jpg bee\n", "line 2: ./a.jpg is on line 1 already"),
        ("a.jpg ant\nx/a.jpg bee\n", r"2 names .*: B.jpg \(no line\), a.jpg \(2 images\); to"),
        ("a.jpg x/ant\n", "line 1: a class with a slash in it: 'x/ant'"),
        ("\n", "gives no class"),
        ('"a.jpg,ant\n', "line 1: '\"a.jpg,ant': unexpected end of data"),
        ("a.jpg,ant\nB.jpg,bee,2\n", "line 2: 'B.jpg,bee,2': 3 columns, but 2 before"),
        ("0,a.jpg,ant\n", r"line 1: 3 columns \(0, a.jpg, ant\) without a header: name them"),
        ("id,sex,age\na,f,1\n", r"line 1: no column is named as the class among 3 columns \(id, "),
        ("id,breed,class\n", r"line 1: several columns may be the class among 3 columns \(id, br"),
        ("id,breed\n", "gives no class"),
        ("a,ant 1 2 3 4 bee 1 2 3 4 \n", "line 1: a has boxes of several classes: ant, bee"),
        (
            "q ant\n",
            r"has no line for any of the 4 images of .*/tree, as .*.jpg; its names are as q$",
        ),
        ("490\n1\n1000\n", "these look like the ILSVRC devkit's numbers"),
        (
            "a.jpg ant\n\nb.jpg bee\n",
            r"3 names do not fit the images of .*/tree: B.jpg \(no line\), a.jpg \(3 images\), "
            r"b.jpg \(line 3, no image\); to take the others as unlabeled images, add",
        ),
        ("ant\n", r"3 names .*: a.jpg \(no line\), x/a.jpg \(no line\), y/a.jpg \(no line\)$"),
        (
            "ant\nbee\ncat\n",
            r"2 names .*: a.jpg \(3 images\), cat \(line 3, no image\)$",
        ),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, message: str) -> None:
    labels = write(tmp_path / "labels.txt", os.fsencode(text))
    names = ("a.jpg", "B.jpg", "x/a.jpg", "y/a.jpg")
    tree = make_tree(tmp_path / "tree", dict.fromkeys(names, b"1"))
    with pytest.raises(DataError, match=rf"labels.txt: {message}"):
        listed(tree, tmp_path, labels=labels)
    labels.unlink()
    with pytest.raises(DataError, match=r"labels.txt: No such file"):
        listed(tree, tmp_path, labels=labels)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,breed\n1,ant\n2,bee\n", "line 1 is its header: names in id, classes in breed"),
        ("filename,label\r\n1.jpg,ant\r\n2.jpg,bee\r\n", "names in filename, classes in label\n"),
        ('\ufeffImage_ID,x\n"1","ant"\n"2", "bee"\n', "names in Image_ID, classes in x"),
        (
            "id,age,Class Name,box\n1,7,ant,\n2,,bee,1 2\n",
            "names in id, classes in Class Name; columns not used: age, box\n",
        ),
        ("image\tfold\tlabel\n1.jpg\t0\tant\n2.jpg\t1\tbee\n", "names in image, classes in label"),
        ("id label\n1 ant\n2.jpg bee\n", "names in id, classes in label"),
        ("1.jpg,ant 1 2 3 4.5 ant -5 6 7 8\n2.jpg,bee 1 2 3 4 \n", "2 lines have boxes, which"),
        ("1,ant\n2,bee\n", ""),
        ("train\\1.jpg,ant\nC:\\x\\2.jpg,bee\n", ""),
    ],
)
def test_tables(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree = make_tree(tmp_path / "tree", {"1.jpg": b"1", "2.jpg": b"2"})
    labels = write(tmp_path / "labels.csv", text)
    assert entries(tree, tmp_path, labels=labels) == [("ant/1.jpg", b"1"), ("bee/2.jpg", b"2")]
    printed = capsys.readouterr().out
    assert said in printed and printed.count("\n") == bool(said)


def test_several_labels_are_no_boxes(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"1.jpg": b"1", "2.jpg": b"2"})
    labels = write(tmp_path / "labels.csv", "1,16 0 1 2 3\n2,cat 1 2 3 x\n")
    assert keys(listed(tree, tmp_path, labels=labels)[1]) == [
        "16 0 1 2 3/1.jpg",
        "cat 1 2 3 x/2.jpg",
    ]


def test_names_without_suffix(tmp_path: Path) -> None:
    """A whole name goes first; a name that two images have fits neither."""
    tree = make_tree(tmp_path / "tree", dict.fromkeys(("a.jpg", "a.png", "b.c.jpg"), b""))
    labels = write(tmp_path / "labels.csv", "a,ant\na.png,bee\nb.c,cat\n")
    found = keys(listed(tree, tmp_path, labels=labels)[1])
    assert found == ["ant/a.jpg", "bee/a.png", "cat/b.c.jpg"]
    labels.write_text("a,ant\nb.c,cat\n")
    with pytest.raises(DataError, match=r"1 name does not fit .*: a \(2 images\)$"):
        listed(tree, tmp_path, labels=labels)


@pytest.mark.parametrize("suffix", ["", ".jpg"])
@pytest.mark.parametrize("form", ["in", "x.tar", "x.tar:in", "parent"])
def test_names_that_differ_in_their_folders(tmp_path: Path, form: str, suffix: str) -> None:
    """The last parts of the path decide, as many as are needed; else the last one alone."""
    classes = {
        "x/1.jpg": "ant",
        "y/1.jpg": "bee",
        "x/y/1.jpg": "cat",
        "1.jpg": "dog",
        "2.jpg": "eel",
    }
    written = (r"in\x\1", "./in/y/1", "in//x/y/1", "1", r"elsewhere\2")
    rows = [f"{name}{suffix},{c}\n" for name, c in zip(written, classes.values(), strict=True)]
    labels = write(tmp_path / "labels.csv", "".join(rows))
    contents = {f"in/{path}": b"" for path in classes}
    make_tree(tmp_path / "parent", contents)
    make_tree(tmp_path, contents)
    make_tar(tmp_path / "x.tar", contents.items())
    _, images = listed(tmp_path / form, tmp_path, labels=labels)
    found = {image.path.removeprefix("in/"): image.class_name for image in images}
    assert found == classes


def test_imagenet_of_kaggle(tmp_path: Path) -> None:
    classes = ("n01440764", "n03995372")
    val = [f"ILSVRC2012_val_0000000{number}" for number in range(4)]
    files = {
        f"train/{c}/{c}_{at}.JPEG": jpeg(10 * at + k)
        for k, c in enumerate(classes)
        for at in (1, 2)
    }
    files |= {f"val/{name}.JPEG": jpeg(100 + at) for at, name in enumerate(val)}
    root = make_tree(tmp_path / "ILSVRC/Data/CLS-LOC", files)
    boxes = ["85 1 499 272 ", "1 2 3 4 {0} 5 6 7 8 ", "0 0 9 9 ", "1 1 2 2 "]
    lines = [
        f"{name},{classes[at % 2]} {boxes[at].format(classes[at % 2])}\n"
        for at, name in enumerate(val)
    ]
    solution = write(
        tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(lines)
    )
    args = ("--src", root / "train", "--val", root / "val", "--val-labels", solution)
    done = run("pack", *args, "--labeled", 2, "--out", tmp_path / "out")
    said = "line 1 is its header: names in ImageId, classes in PredictionString"
    assert f"make_rec: {solution}: {said}\n" in done.stderr
    assert f"make_rec: {solution}: 4 lines have boxes, which are not used\n" in done.stderr
    found = {(key, image) for _, _, key, image in read_split(tmp_path / "out", "val")}
    assert found == {
        (f"{classes[at % 2]}/{name}.JPEG", files[f"val/{name}.JPEG"]) for at, name in enumerate(val)
    }


def flat_tars(tmp_path: Path) -> tuple[Path, Path]:
    """Write six images into two flat tars."""
    tars = tmp_path / "t0.tar", tmp_path / "t1.tar"
    for at, path in enumerate(tars):
        make_tar(path, [(f"{number}.jpg", jpeg(number)) for number in range(3 * at, 3 * at + 3)])
    return tars


CLASS_OF = {f"{number}.jpg": ("ant", "bee")[number % 2] for number in range(6)}


@pytest.mark.parametrize("pattern", [False, True])
def test_one_labels_file_for_several_sources(tmp_path: Path, pattern: bool) -> None:
    tars = flat_tars(tmp_path)
    sources = (f"{tmp_path}/t?.tar",) if pattern else tars
    labels = write(tmp_path / "all.csv", "".join(f"{n},{c}\n" for n, c in CLASS_OF.items()))
    args = ("--src", *sources, "--labels", labels, "--labeled", 2, "--out", tmp_path / "out")
    run("pack", *args)
    rows = {key: image for *_, key, image in read_split(tmp_path / "out", "train")}
    assert rows == {f"{c}/{n}": jpeg(int(n[0])) for n, c in CLASS_OF.items()}
    assert not verified(tmp_path / "out", deep=True).problems
    labels.write_text(labels.read_text().replace("1.jpg,", "7.jpg,").replace("5.jpg,", "8.jpg,"))
    line = refuse(*args, status=4)
    assert f"{labels}: 4 names do not fit the images of {' + '.join(map(str, sources))}: " in line
    for fault in (
        "1.jpg (no line)",
        "5.jpg (no line)",
        "7.jpg (line 2, no image)",
        "8.jpg (line 6",
    ):
        assert fault in line


def test_refused_labels_of_several_sources(tmp_path: Path) -> None:
    tars, out = flat_tars(tmp_path), ("--out", tmp_path / "out")
    labels = write(tmp_path / "classes.txt", "ant\nbee\n" * 3)
    line = refuse("--src", *tars, "--labels", labels, *out, status=4)
    fault = "one class a line, in the order of the names, is for one source, not 2"
    assert line.endswith(f"{labels}: {fault}; write `name class`")
    labels.write_text("".join(f"{n},{c}\n" for n, c in CLASS_OF.items()))
    line = refuse("--src", *tars, "--labels", write(tmp_path / "x.json", "{}"), *out, status=4)
    assert "x.json: a text file is needed, with `name class` on each line, or a CSV" in line
    records = make_records(tmp_path / "x.rec", [(0, 0, jpeg(0))])
    line = refuse("--src", *tars, records, "--labels", labels, *out, status=2)
    assert f"x.rec has its own labels: leave out the labels file {labels}" in line


@pytest.mark.parametrize("form", ["tree", "x.tar:in", "t?.tar"])
def test_images_without_a_line_are_left_to_the_unlabeled_source(tmp_path: Path, form: str) -> None:
    images = {name: jpeg(int(name[0])) for name in CLASS_OF}
    make_tree(tmp_path / "tree", images)
    make_tar(tmp_path / "x.tar", [(f"in/{name}", image) for name, image in images.items()])
    flat_tars(tmp_path)
    labels = write(tmp_path / "some.csv", "0,ant\n1,bee\n3,bee\n")
    source = tmp_path / form
    args = ("--src", source, "--labels", labels, "--out", tmp_path / "out")
    line = refuse(*args, status=4)
    hint = f"to take the others as unlabeled images, add --unlabeled-src {shlex.quote(str(source))}"
    assert "3 names do not fit" in line and line.endswith(f"; {hint}")
    other = make_tree(tmp_path / "other", {"2.jpg": jpeg(2)})
    assert "3 names do not fit" in refuse(*args, "--unlabeled-src", other, status=4)
    done = run("pack", *args, "--unlabeled-src", source)
    said = f"make_rec: {source}: 3 images have a line in {labels}, 3 have none: left to --unlabeled"
    assert done.stderr.count(said) == 1
    assert "packed once" not in done.stderr
    rows = read_split(tmp_path / "out", "train")
    assert {key.rpartition("/")[2]: label for _, label, key, _ in rows} == {
        "0.jpg": 0, "1.jpg": 1, "2.jpg": -1, "3.jpg": 1, "4.jpg": -1, "5.jpg": -1
    }  # fmt: skip
    assert {image for *_, image in rows} == {*images.values()}
    labels.write_text("0,ant\n1,bee\n7,bee\n")
    line = refuse(*args[:4], "--unlabeled-src", source, "--out", tmp_path / "two", status=4)
    assert "1 name does not fit" in line and line.endswith("7 (line 3, no image)")
    labels.write_text("ant\nbee\n")  # which images these are is known only if all have a class
    line = refuse(*args[:4], "--unlabeled-src", source, "--out", tmp_path / "two", status=4)
    assert "4 names do not fit" in line


def test_beside_a_partly_labeled_source_others_have_their_own_classes(tmp_path: Path) -> None:
    """As in self-training: class folders, and labels of some images that have the same names."""
    tree = make_tree(
        tmp_path / "tree", {f"{c}/0.jpg": jpeg(k) for k, c in enumerate(("ant", "bee"))}
    )
    records = make_records(tmp_path / "x.rec", [(0, 0, jpeg(50)), (1, 1, jpeg(51))])
    pool = make_tree(tmp_path / "pool", {name: jpeg(int(name[0]) + 9) for name in CLASS_OF})
    labels = write(tmp_path / "some.csv", "image,label\n0.jpg,bee\n2.jpg,ant\n")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    args = ("--src", tree, records, pool, "--unlabeled-src", pool, "--labels", labels)
    run("pack", *args, "--out", tmp_path / "out")
    found = {image: label for _, label, _, image in read_split(tmp_path / "out", "train_label")}
    assert found == {jpeg(0): 0, jpeg(1): 1, jpeg(50): 0, jpeg(51): 1, jpeg(9): 1, jpeg(11): 0}
    assert len(read_split(tmp_path / "out", "train_unlabel")) == 10
    labels.write_text("0.jpg,bee\n7.jpg,ant\n")  # of no image
    line = refuse(*args, "--out", tmp_path / "two", status=4)
    assert "1 name does not fit" in line and line.endswith("7.jpg (line 2, no image)")


def test_images_without_a_label(tmp_path: Path) -> None:
    """A class -1 is none, as in a .lst, and no class that gets label 0."""
    tree = make_tree(tmp_path / "in", {f"{at}.jpg": jpeg(at) for at in range(3)})
    labels = write(tmp_path / "labels.csv", "0,0\n1,-1\n2,1\n")
    how = ("--labeled", "all", "--out", tmp_path / "out")
    done = run("pack", "--src", tree, "--labels", labels, *how)
    assert "1 image has no label (-1): unlabeled images only" in done.stderr
    rows = {key: label for _, label, key, _ in read_split(tmp_path / "out", "train")}
    assert rows == {"0/0.jpg": 0, "1.jpg": -1, "1/2.jpg": 1}
    held = ("--val", tree, "--val-labels", labels)
    line = refuse("--src", tree, "--labels", labels, *held, *how, status=4)
    assert "1.jpg: has no label (-1), which validation images need" in line


def test_one_file_for_training_and_validation(tmp_path: Path) -> None:
    """An image of either uses a line; a line of none is a fault of both."""
    args = ["--labeled", 2, "--out", tmp_path / "out"]
    labels = write(tmp_path / "all.csv", "".join(f"{n},{c}\n" for n, c in CLASS_OF.items()))
    for option, numbers in (("src", range(4)), ("val", range(4, 6))):
        images = {f"{number}.jpg": jpeg(number) for number in numbers}
        args += [f"--{option}", make_tree(tmp_path / option, images)]
    args += ["--labels", labels, "--val-labels", f"{tmp_path}/./all.csv"]
    run("pack", *args)
    assert len(read_split(tmp_path / "out", "train")) == 4
    assert {key for *_, key, _ in read_split(tmp_path / "out", "val")} == {"ant/4.jpg", "bee/5.jpg"}
    labels.write_text(f"{labels.read_text()}7.jpg,ant\n")
    line = refuse(*args, status=4)
    fault = f"1 name does not fit the images of {tmp_path}/src + {tmp_path}/val: 7.jpg (line 7, no"
    assert f"{labels}: {fault}" in line
    (tmp_path / "src/8.jpg").write_bytes(jpeg(8))
    assert "8.jpg (no line); " in refuse(*args, status=4)


def test_one_folder_for_all(tmp_path: Path) -> None:
    """Training and validation images by two files, and the rest."""
    images = make_tree(tmp_path / "images", {name: jpeg(int(name[0])) for name in CLASS_OF})
    labels = write(tmp_path / "train.csv", "0,ant\n1,bee\n")
    held = write(tmp_path / "val.csv", "2,ant\n3,bee\n")
    args = ("--src", images, "--labels", labels, "--val", images, "--val-labels", held)
    run("pack", *args, "--unlabeled-src", images, "--out", tmp_path / "out")
    train, val = (read_split(tmp_path / "out", split) for split in ("train", "val"))
    assert {key for *_, key, _ in val} == {"ant/2.jpg", "bee/3.jpg"}
    assert {key for *_, key, _ in train} == {"ant/0.jpg", "bee/1.jpg", "4.jpg", "5.jpg"}
