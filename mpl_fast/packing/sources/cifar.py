"""CIFAR-10 and CIFAR-100 as their archives are published, in Python's form and the binary one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.first_few import first_few
from mpl_fast.packing.sources.plain_pickle import PlainArray, load_plain
from mpl_fast.packing.sources.raw_pixels import png
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.sources.tar import clean_name, first_members, open_tar
from mpl_fast.packing.sources.unpacked import Unpacked, UnpackedSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE  # bytes of an image: all red, all green, all blue
_LARGEST = 1 << 28  # bytes; more than any batch
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class _Form(NamedTuple):
    """The files of an archive."""

    names: str  # file with the class names
    key: str  # of the names in it; "" if it is text
    labels: str  # key of the labels in a batch; "" if the form is binary
    label_bytes: int  # before an image, of which the last is its label; binary form only
    train: tuple[str, ...]
    test: tuple[str, ...]


_FORMS = {
    "cifar-10-batches-py": _Form(
        "batches.meta", "label_names", "labels", 0, _BATCHES, ("test_batch",)
    ),
    "cifar-10-batches-bin": _Form(
        "batches.meta.txt", "", "", 1, tuple(f"{n}.bin" for n in _BATCHES), ("test_batch.bin",)
    ),
    "cifar-100-python": _Form("meta", "fine_label_names", "fine_labels", 0, ("train",), ("test",)),
    "cifar-100-binary": _Form("fine_label_names.txt", "", "", 2, ("train.bin",), ("test.bin",)),
}


class CifarSource(UnpackedSource):
    """The images of `ARCHIVE:train` or `ARCHIVE:test`, as PNG."""

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        return _form_of(path) is not None

    @classmethod
    def _unpack(cls, request: Request) -> Unpacked:
        path, form = request.path, _form_of(request.path)
        assert form is not None
        files = {"train": form.train, "test": form.test}.get(clean_name(request.folder))
        if files is None:
            has = "has the parts train and test"
            raise DataError(f"{request.spec}: {has}; name one, as {path}:train")
        names: list[str] = []
        for name, stream in _members(path, (form.names,), to_end=False):
            names = _class_names(stream, form, f"{path}: {name}")
        return Unpacked((path,), names, _images(path, form, files, len(names)))


def _form_of(path: Path) -> _Form | None:
    names = first_members(path)
    return _FORMS.get(names[0].partition("/")[0]) if names else None


def _members(path: Path, files: Sequence[str], *, to_end: bool) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the members with these base names, in the archive's order.

    Only at the end of the archive is its checksum compared.
    """
    missing = [*files]
    with open_tar(path, _LARGEST) as tar:
        for item in tar:
            name = item.name.rpartition("/")[2]
            if name in missing and item.size > _LARGEST:
                raise DataError(f"{path}: {name} has {item.size} bytes: no batch as published")
            if name in missing and item.isreg() and (stream := tar.extractfile(item)) is not None:
                missing.remove(name)
                yield name, stream
            if not missing and not to_end:
                return
        while tar.fileobj is not None and tar.fileobj.read(1 << 20):
            pass
    if missing:
        raise DataError(f"{path}: has no {first_few(missing)}: not the archive as published")


def _class_names(stream: IO[bytes], form: _Form, where: str) -> list[str]:
    names = stream.read().split(b"\n") if not form.key else _field(stream, form.key, where)
    if not isinstance(names, list):
        raise DataError(f"{where}: {form.key} is no list")
    texts = [_text(name).strip() for name in names]
    return [text for text in texts if text]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _field(stream: IO[bytes], key: str, where: str) -> object:
    return _fields(stream, (key,), where)[key]


def _fields(stream: IO[bytes], keys: Sequence[str], where: str) -> dict[str, object]:
    """Return those fields of a pickled dict."""
    value = load_plain(stream, where)
    fields = {_text(key): field for key, field in value.items()} if isinstance(value, dict) else {}
    if missing := [key for key in keys if key not in fields]:
        raise DataError(f"{where}: has no {first_few(missing)}: no batch as published")
    return fields


def _images(
    path: Path, form: _Form, files: Sequence[str], classes: int
) -> Iterator[tuple[int, str, bytes]]:
    for name, stream in _members(path, files, to_end=True):
        where = f"{path}: {name}"
        pixels, labels = _batch(stream, form, where)
        for row, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            if not isinstance(label, int) or not 0 <= label < classes:
                raise DataError(f"{where}: label {label} of image {row}, of {classes} classes")
            planes = image.reshape(3, _SIDE, _SIDE)
            yield (
                label,
                f"{name.removesuffix('.bin')}_{row:05d}.png",
                png(planes.transpose(1, 2, 0)),
            )


def _batch(stream: IO[bytes], form: _Form, where: str) -> "tuple[NDArray[np.uint8], list[object]]":
    """Return pixels (N, 3072) uint8 and N labels."""
    import numpy as np

    if form.labels:
        fields = _fields(stream, (form.labels, "data"), where)
        data, labels = fields["data"], fields[form.labels]
        pixels = data.values if isinstance(data, PlainArray) else None
        if not isinstance(labels, list) or pixels is None:
            raise DataError(f"{where}: its data are no array, or its labels no list")
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
            shape = f"{pixels.dtype} {pixels.shape}"
            raise DataError(f"{where}: pixels {shape}, not uint8 ({len(labels)}, {_PIXELS})")
        return pixels, labels
    content = np.frombuffer(stream.read(), np.uint8)
    row = form.label_bytes + _PIXELS
    if content.size % row or not content.size:
        raise DataError(f"{where}: {content.size} bytes are no multiple of {row}: cut short?")
    rows = content.reshape(-1, row)
    return rows[:, form.label_bytes :], rows[:, form.label_bytes - 1].tolist()
