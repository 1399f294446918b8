"""Data sets as published: every pixel and label; nothing in a pickle is executed."""

import gzip
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mpl_fast.errors import DataError
from tests.packing.made_sources import content, keys, listed, opened
from tests.packing.packs import make_tar, pack, read_split, refuse

Pixels = NDArray[np.uint8]
NAMES = ("plane", "auto", "bird")  # not sorted
FINE = ("whale", "apple")
seeded = np.random.default_rng(0)


def random_pixels(*shape: int) -> Pixels:
    return seeded.integers(0, 256, shape, np.uint8)


def decoded(image: bytes) -> Pixels:
    """Return RGB, or gray of a gray PNG."""
    assert image.startswith(b"\x89PNG")
    pixels: Any = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    return np.asarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels)


def images_of(spec: Path | str, work: Path) -> dict[str, Pixels]:
    """Return the pixels of each image by `class/name`."""
    source, images = listed(spec, work)
    found = [decoded(content(source, image)) for image in images]
    return dict(zip(keys(images), found, strict=True))


def require_equal(found: Mapping[str, Pixels], expected: Mapping[str, Pixels]) -> None:
    assert sorted(found) == sorted(expected)
    for key, pixels in expected.items():
        np.testing.assert_array_equal(found[key], pixels)


# CIFAR.


def python2(value: object) -> bytes:
    """Pickle as Python 2 and its NumPy did, which wrote the published files."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(each) for item in value.items() for each in item) + b"u"
    assert isinstance(value, np.ndarray)
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    kind = (
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return empty + b"(K\x01" + shape + kind + b"\x89" + python2(value.tobytes()) + b"tb"


def dumped(value: object, protocol: int) -> bytes:
    return b"\x80\x02" + python2(value) + b"." if protocol < 0 else pickle.dumps(value, protocol)


def batches() -> dict[str, tuple[Pixels, list[int]]]:
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    return {name: (random_pixels(2, 3072), [at % 3, 2]) for at, name in enumerate(names)}


BATCHES = batches()
HUNDRED = {name: (random_pixels(3, 3072), [1, 0, 1]) for name in ("train", "test")}


def cifar(
    path: Path, form: str, protocol: int = -1, replaced: Mapping[str, bytes] | None = None
) -> Path:
    """Write an archive as published; `replaced` are other contents of its files."""
    files: dict[str, bytes] = {"readme.html": b"<html>"}
    ten = "-10-" in form
    for name, (pixels, labels) in (BATCHES if ten else HUNDRED).items():
        if "py" in form:
            fields = {b"data": pixels, b"labels" if ten else b"fine_labels": labels}
            files[name] = dumped(fields | {b"filenames": [b"a.png"] * len(labels)}, protocol)
        else:
            before = [[label] if ten else [9, label] for label in labels]
            files[f"{name}.bin"] = np.hstack([np.array(before, np.uint8), pixels]).tobytes()
    names = [name.encode() for name in (NAMES if ten else FINE)]
    if "py" in form:
        key = b"label_names" if ten else b"fine_label_names"
        files["batches.meta" if ten else "meta"] = dumped({key: names}, protocol)
    else:
        text = "batches.meta.txt" if ten else "fine_label_names.txt"
        files[text] = b"\n".join([*names, b"", b""])
    files |= replaced or {}
    return make_tar(
        path, [(f"{form}/{name}", data) for name, data in sorted(files.items())], "w:gz"
    )


def expected_cifar(part: str, ten: bool) -> dict[str, Pixels]:
    return {
        f"{(NAMES if ten else FINE)[label]}/{name}_{row:05d}.png": (
            pixels[row].reshape(3, 32, 32).transpose(1, 2, 0)
        )
        for name, (pixels, labels) in (BATCHES if ten else HUNDRED).items()
        if ("test" in name) == (part == "test")
        for row, label in enumerate(labels)
    }


@pytest.mark.parametrize(
    ("form", "protocol"),
    [
        *(("cifar-10-batches-py", protocol) for protocol in (-1, 2, 4, 5)),
        ("cifar-10-batches-bin", 0),
        ("cifar-100-python", -1),
        ("cifar-100-binary", 0),
    ],
)
def test_cifar(tmp_path: Path, form: str, protocol: int) -> None:
    archive = cifar(tmp_path / "data.tar.gz", form, protocol)
    for part in ("train", "test"):
        require_equal(
            images_of(f"{archive}:{part}", tmp_path), expected_cifar(part, "-10-" in form)
        )
    source, _ = listed(f"{archive}:test", tmp_path)
    assert source.class_order == (NAMES if "-10-" in form else FINE)
    for spec in (archive, f"{archive}:val"):
        with pytest.raises(DataError, match=rf"parts train and test; name one, as {archive}:train"):
            listed(spec, tmp_path)


def test_cifar_packed(tmp_path: Path) -> None:
    """Both forms give the same records, with the publisher's labels."""
    packs = []
    for form in ("cifar-10-batches-py", "cifar-10-batches-bin"):
        archive = cifar(tmp_path / f"{form}.tar.gz", form)
        how = ("--src", f"{archive}:train", "--val", f"{archive}:test", "--labeled", "3")
        packs.append(pack(*how, out=tmp_path / form))
    for name in ("train.rec", "val.rec", "train_label.idx", "train.lst", "classes.txt"):
        assert (packs[0] / name).read_bytes() == (packs[1] / name).read_bytes()
    assert (packs[0] / "classes.txt").read_text().split() == list(NAMES)
    pixels, labels = BATCHES["test_batch"]
    for _, label, key, image in read_split(packs[0], "val"):
        row = int(key[-5:].removesuffix(".png")[-1:])
        assert label == labels[row]
        np.testing.assert_array_equal(
            decoded(image), pixels[row].reshape(3, 32, 32).transpose(1, 2, 0)
        )


class Command:
    """What a malicious pickle would do when it is read."""

    def __init__(self, call: Any, *values: object) -> None:
        self.call, self.values = call, values

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.call, self.values


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_malicious_pickle(tmp_path: Path, file: str) -> None:
    proof = tmp_path / "proof"
    for call, values, name in (
        (os.system, (f"touch {proof}",), "posix.system"),
        (eval, (f"open({str(proof)!r}, 'w')",), "builtins.eval"),
        (np.load, (str(proof),), "numpy.load"),
        (getattr, ("x", "upper"), "builtins.getattr"),
    ):
        for protocol in (0, 2, 5):
            data = pickle.dumps({b"data": Command(call, *values)}, protocol)
            archive = cifar(tmp_path / "x.tar.gz", "cifar-10-batches-py", replaced={file: data})
            out = tmp_path / "out"
            line = refuse("--src", f"{archive}:train", "--out", out, status=4)
            where = f"{archive}: {file}: refused, its pickle calls "
            assert where in line
            assert name.rpartition(".")[2] in line
    assert not proof.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", r"damaged pickle \(EOFError"),
        (
            pickle.dumps({b"data": np.array([len])}, 4),
            r"damaged pickle \(ValueError: an array of O8",
        ),
        (b"cnumpy\ndtype\n}S'x'\nI1\nsb.", r"damaged pickle \(TypeError"),
        (b"c_codecs\nencode\n(N}V__code__\nI1\nstb.", r"damaged pickle \(AttributeError"),
        (b"cnumpy\nndarray\n(I9\ntR.", r"damaged pickle \(TypeError"),
        (  # an array that is never filled
            b"}(S'labels'\n(lI0\naS'data'\ncnumpy.core.multiarray\n_reconstruct\n(tRu.",
            "its data are no array, or its labels no list",
        ),
        (
            b"}(S'labels'\n(lI0\naS'data'\ncnumpy.core.numeric\n_frombuffer\n"
            b"(I3072\ncnumpy\ndtype\n(S'u1'\ntR(I1\nI3072\ntS'C'\ntRu.",
            r"damaged pickle \(ValueError: the content of an array is no bytes",
        ),
        (pickle.dumps([1]), "has no labels, data: no batch as published"),
        (
            pickle.dumps({"labels": [0], "data": [1]}),
            "its data are no array, or its labels no list",
        ),
        (
            pickle.dumps({"labels": [0], "data": np.zeros((1, 9), np.uint8)}),
            r"pixels uint8 \(1, 9\), not uint8 \(1, 3072\)",
        ),
        (
            pickle.dumps({"labels": [3], "data": np.zeros((1, 3072), np.uint8)}),
            "label 3 of image 0, of 3 classes",
        ),
    ],
)
def test_other_batches(tmp_path: Path, value: bytes, message: str) -> None:
    archive = cifar(tmp_path / "x.tar.gz", "cifar-10-batches-py", replaced={"data_batch_2": value})
    with pytest.raises(DataError, match=rf"x.tar.gz: data_batch_2: ({message})"):
        listed(f"{archive}:train", tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_incomplete_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar(
        tmp_path / "x.tar.gz", "cifar-10-batches-bin", replaced={"data_batch_2.bin": bytes(3074)}
    )
    with pytest.raises(DataError, match=r"data_batch_2.bin: 3074 bytes are no multiple of 3073"):
        listed(f"{archive}:train", tmp_path)
    make_tar(archive, [("cifar-10-batches-py/batches.meta", dumped({b"label_names": [b"a"]}, 2))])
    with pytest.raises(DataError, match=r"has no data_batch_1, .*: not the archive as published"):
        listed(f"{archive}:train", tmp_path)
    whole = cifar(archive, "cifar-10-batches-py").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mpl_fast.packing.sources.cifar._LARGEST", 6000)
        with pytest.raises(DataError, match=r"data_batch_1 has \d+ bytes: no batch as published"):
            listed(f"{archive}:train", tmp_path)
    for damaged in (whole[:-2000], with_other_byte(whole, -6)):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x.tar.gz: (damaged or not a tar archive|CRC check)"):
            listed(f"{archive}:train", tmp_path)


def with_other_byte(data: bytes, at: int) -> bytes:
    """Return data with a changed byte, such as one of a checksum."""
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


# SVHN.


def svhn(path: Path, pixels: Pixels, labels: Any, **how: Any) -> Path:
    scipy_io = pytest.importorskip("scipy.io")
    variables = {"X": np.asfortranarray(pixels.transpose(1, 2, 3, 0)), "y": labels}
    scipy_io.savemat(path, variables, **how)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.float64, np.int32])
def test_svhn(tmp_path: Path, compressed: bool, kind: type) -> None:
    pixels = random_pixels(700, 32, 32, 3)  # more than a block
    labels: Any = np.array([[1 + number % 10] for number in range(700)], kind)
    path = svhn(tmp_path / "train_32x32.mat", pixels, labels, do_compression=compressed)
    found = images_of(path, tmp_path)
    require_equal(
        found,
        {f"{(1 + row) % 10}/train_32x32_{row:06d}.png": image for row, image in enumerate(pixels)},
    )
    assert listed(path, tmp_path)[0].class_order == tuple("0123456789")


def test_no_svhn(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    pixels, labels = random_pixels(2, 32, 32, 3), np.array([[1], [2]], np.uint8)
    path = svhn(tmp_path / "x.mat", pixels, labels)
    whole = path.read_bytes()
    cases: list[tuple[bytes, str]] = [
        (whole[:-5000], r"x.mat: cut short|has no variable y"),
        (whole[:1000], r"x.mat: cut short|has no variable y"),
        (b"MATLAB 7.3 MAT-file" + whole[19:], r"no MATLAB 5 file .*save -v7"),
        (b"", r"no MATLAB 5 file"),
    ]
    compressed = svhn(path, pixels, labels, do_compression=True).read_bytes()
    end = 136 + int.from_bytes(compressed[132:136], "little")  # of X, with its checksum
    cases.append((with_other_byte(compressed, end - 1), r"x.mat: damaged \(Error -3 .* check"))
    for variables, message in (
        ({"y": labels}, "has no variable X"),
        ({"X": pixels, "y": labels}, r"X is u1 \(2, 32, 32, 3\), not uint8 \(height, width, 3"),
        ({"X": pixels.astype(float), "y": labels}, r"X is <f8"),
        ({"X": pixels.transpose(1, 2, 3, 0), "y": labels + 10}, "y is not a digit, 1 to 10, for"),
        ({"X": pixels.transpose(1, 2, 3, 0), "y": labels[:1]}, "for each of 2 images"),
    ):
        scipy_io.savemat(tmp_path / "y.mat", variables)
        cases.append(((tmp_path / "y.mat").read_bytes(), message))
    (tmp_path / "y.mat").unlink()
    for data, message in cases:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            listed(path, tmp_path)


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name: bytes, sides: bytes, numbers: bytes) -> bytes:
    head = element(6, bytes(8)) + element(5, sides) + element(1, name)
    return element(14, head + numbers)


@pytest.mark.parametrize(
    ("sides", "numbers", "message"),
    [
        (bytes(5), b"", "x.mat: damaged: 5 bytes for the sides of a matrix"),
        (struct.pack("<4i", 0, 2, 3, 1), element(2, b""), r"X is u1 \(0, 2, 3, 1\), not uint8"),
        (struct.pack("<4i", -1, -2, 3, 1), element(2, bytes(6)), r"X is u1 \(-1, -2, 3, 1\), not"),
        (
            struct.pack("<4i", 2, 2, 3, 1),
            struct.pack("<HH4x", 2, 12),
            "x.mat: damaged: 12 bytes in a place of 4",
        ),
    ],
)
def test_svhn_with_other_sides(tmp_path: Path, sides: bytes, numbers: bytes, message: str) -> None:
    head = b"MATLAB 5.0".ljust(126) + b"IM"
    digits = matrix(b"y", struct.pack("<2i", 1, 1), element(2, b"\1"))
    (tmp_path / "x.mat").write_bytes(head + digits + matrix(b"X", sides, numbers))
    with pytest.raises(DataError, match=message):
        listed(tmp_path / "x.mat", tmp_path)


def test_svhn_that_cannot_be_read(tmp_path: Path) -> None:
    """It is the source's fault, not the output folder's."""
    (tmp_path / "x.mat").symlink_to("/proc/self/mem")
    line = refuse("--src", tmp_path / "x.mat", "--out", tmp_path / "out", status=4)
    assert "x.mat: Input/output error" in line


# MNIST.


def idx(path: Path, values: Pixels) -> Path:
    head = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    data = head + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz"),
    ],
)
def test_mnist(tmp_path: Path, images: str, labels: str) -> None:
    pixels, digits = random_pixels(1400, 28, 28), random_pixels(1400) % 10  # more than a block
    path = idx(tmp_path / images, pixels)
    with pytest.raises(
        DataError, match=r"its labels must be beside it, as train-labels.idx1-ubyte"
    ):
        listed(path, tmp_path)
    bare = opened(path, tmp_path, unlabeled=True)
    assert [image.class_name for image in bare.images()] == [""] * 1400
    beside = idx(tmp_path / labels, digits)
    require_equal(
        images_of(path, tmp_path),
        {f"{digits[row]}/train-images_{row:05d}.png": image for row, image in enumerate(pixels)},
    )
    source, _ = listed(path, tmp_path)
    assert source.class_order == tuple("0123456789")
    with pytest.raises(DataError, match="holds labels; name the file of the images"):
        listed(beside, tmp_path)
    os.utime(beside, ns=(7, 7))  # other labels, by their time
    assert opened(path, tmp_path).file != source.file


def test_unusable_idx(tmp_path: Path) -> None:
    path, beside = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
    whole = idx(path, random_pixels(3, 4, 4)).read_bytes()
    labels = idx(beside, random_pixels(3)).read_bytes()
    for images, classes, message in (
        (whole[:-1], labels, "cut short at image 2 of 3"),
        (whole[:12], labels, "cut short in its header"),
        (whole, labels[:-1], "a-labels-idx1-ubyte: no idx file of labels, or cut short"),
        (whole + b"1", labels, "goes on after its 3 images"),
        (with_other_byte(gzip.compress(whole), -6), labels, "CRC check failed"),
        (whole, with_other_byte(gzip.compress(labels), -6), "CRC check failed"),
        (whole, whole, "a-labels-idx1-ubyte: no idx file of labels, or cut short"),
        (whole, idx(beside, random_pixels(4)).read_bytes(), "has 3 images, but .* 4 labels"),
    ):
        path.write_bytes(images)
        beside.write_bytes(classes)
        with pytest.raises(DataError, match=message):
            listed(path, tmp_path)


# STL-10.


def stl10(folder: Path, part: str, pixels: Pixels, labels: list[int]) -> Path:
    """Write files as published, in an order of pixels that is MATLAB's."""
    (folder / "class_names.txt").write_text("plane\nauto\nbird\n")
    if labels:
        (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    path = folder / f"{part}_X.bin"
    path.write_bytes(b"".join(image.tobytes(order="F") for image in pixels))
    return path


def test_stl10(tmp_path: Path) -> None:
    pixels = random_pixels(5, 96, 96, 3)
    path = stl10(tmp_path, "train", pixels, [1, 3, 2, 3, 3])
    classes = ("plane", "bird", "auto", "bird", "bird")
    expected = {f"{c}/train_{row:06d}.png": pixels[row] for row, c in enumerate(classes)}
    require_equal(images_of(path, tmp_path), expected)
    assert listed(path, tmp_path)[0].class_order == NAMES
    bare = stl10(tmp_path, "unlabeled", pixels[:2], [])
    source = opened(bare, tmp_path, unlabeled=True)
    images = list(source.images())
    assert [(image.class_name, image.name) for image in images] == [
        ("", f"unlabeled_{row:06d}.png") for row in range(2)
    ]
    np.testing.assert_array_equal(decoded(content(source, images[1])), pixels[1])
    fold = tmp_path / "fold0.txt"
    fold.write_text("".join(f"train_{row:06d}.png\n" for row in range(3)))
    sources = ["--src", path, "--unlabeled-src", bare, "--val", "1"]
    rec = pack(*sources, "--labeled", fold, out=tmp_path / "rec")
    labeled = {row[2]: row[1] for row in read_split(rec, "train_label")}
    assert labeled == {key: NAMES.index(key.split("/")[0]) for key in list(expected)[:3]}
    assert len(read_split(rec, "train_unlabel")) == 6


def test_unusable_stl10(tmp_path: Path) -> None:
    whole, few = random_pixels(2, 96, 96, 3), random_pixels(1, 96, 96, 3)
    for pixels, labels, message in (
        (whole, [], "test_y.bin must be beside it .or give it as --unlabeled-src"),
        (whole, [1], "has 2 images, but .*test_y.bin 1"),
        (whole, [1, 4], "test_y.bin: labels are not all 1 to 3"),
        (whole, [0, 1], "test_y.bin: labels are not all 1 to 3"),
        (few[:, :95], [1], "27360 bytes are no multiple of 27648: cut short"),
        (few[:0], [], "0 bytes are no multiple"),
    ):
        path = stl10(tmp_path, "test", pixels, labels)
        with pytest.raises(DataError, match=message):
            listed(path, tmp_path)
    stl10(tmp_path, "test", few, [1])
    (tmp_path / "class_names.txt").unlink()
    with pytest.raises(DataError, match=r"class_names.txt must be beside it$"):
        listed(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["svhn", "compressed svhn", "mnist", "python", "binary"])
def test_damage_never_raises_anything_else(tmp_path: Path, form: str) -> None:
    """A byte is changed: the images are listed, or it is refused with a line."""
    part = ""
    if "svhn" in form:
        labels = np.ones((3, 1), np.uint8)
        path = svhn(
            tmp_path / "x.mat", random_pixels(3, 32, 32, 3), labels, do_compression="c" in form
        )
    elif form == "mnist":
        idx(tmp_path / "x-labels-idx1-ubyte", random_pixels(3))
        path = idx(tmp_path / "x-images-idx3-ubyte", random_pixels(3, 4, 4))
    else:
        name = "cifar-100-python" if form == "python" else "cifar-100-binary"
        path, part = cifar(tmp_path / "x.tar.gz", name), ":train"
        path.write_bytes(gzip.decompress(path.read_bytes()))
    whole = path.read_bytes()
    heads = [at for at in range(len(whole)) if whole[max(0, at - 40) : at + 40].strip(b"\0")]
    choice = np.random.default_rng(1)
    outcomes = {"listed": 0, "refused": 0}
    for _ in range(300):
        data = bytearray(whole)
        at = int(choice.choice(heads[:300] if choice.random() < 0.7 else heads))
        data[at] = int(choice.integers(256))
        path.write_bytes(data)
        try:
            source = opened(f"{path}{part}", tmp_path, report=lambda line: None)
            outcomes["listed"] += bool(list(source.images()))
        except DataError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        for spool in tmp_path.glob("spool-*"):
            spool.unlink()
    assert min(outcomes.values()) > 20, outcomes
