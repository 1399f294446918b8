"""Classes of images by their names, from a labels file or another list."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mpl_fast.errors import DataError
from mpl_fast.first_few import Tally, counted

if TYPE_CHECKING:
    from mpl_fast.packing.sources.source import Image, Request


class LabelLine(NamedTuple):
    """One line of a labels file."""

    number: int  # from 1
    path: str  # of the image, as written; "": the line has a class only
    label: str  # "": the image has none


_SEVERAL = LabelLine(0, "", "")  # in place of lines whose paths differ in their folders only


class Labels:
    """Classes by the names of images, for all sources of an option; held in memory.

    An image has the line with its file name, else with that less its suffix. Where lines differ in
    their folders only, it is the line with the most of the last parts of its path.
    """

    def __init__(self, path: str, lines: Sequence[LabelLine]) -> None:
        """Raises DataError when a path is in two lines; path names the file in errors."""
        self.path = path
        self._lines = [*lines]
        self._by_name: dict[str, LabelLine] = {}
        self._by_path: dict[str, LabelLine] = {}  # of those that are _SEVERAL by name
        self._specs: list[str] = []
        self._lacking: list[str] = []  # of those with images without a line
        self._images: Counter[int] = Counter()  # by number of their line
        # Of the training images if the file is for both; None: those come first.
        self._earlier: Counter[int] | None = Counter()
        self._faults = Tally()
        for line in lines if self.has_names else ():
            self._add(line)

    def for_validation(self) -> "Labels":
        """Return the same for validation images, after which lines of neither are faults."""
        held = Labels(self.path, self._lines)
        held._specs = self._specs
        held._earlier, self._earlier = self._images, None
        return held

    @property
    def has_names(self) -> bool:
        """Whether lines name their images; else they are in the order of the names."""
        return all(line.path for line in self._lines[:1])

    def _add(self, line: LabelLine) -> None:
        for path in _forms(line.path):
            self._add_path(line, path)

    def _add_path(self, line: LabelLine, path: str) -> None:
        name = path.rpartition("/")[2]
        other = self._by_name.get(name)
        if other is None:
            self._by_name[name] = line
            return
        if other is not _SEVERAL:
            self._by_path |= dict.fromkeys(_forms(other.path), other)
            self._by_name[name] = _SEVERAL
        if first := self._by_path.get(path):
            fault = f"{line.path} is on line {first.number} already"
            raise DataError(f"{self.path}: line {line.number}: {fault}")
        self._by_path[path] = line

    def labeled(self, images: "Iterable[Image]", request: "Request") -> "Iterator[Image]":
        """Yield the images of a source that have a line, with its class.

        DataError if there is none; the others are faults for `require_fit`, unless lines have names
        and the request is a partial one.
        """
        self._specs.append(request.spec)
        named = self.has_names
        partial = request.partial and named
        if not named:
            images = self._in_order(images)
        folder = f"{request.path.absolute()}/{request.folder}/"
        found = left = 0
        for image in images:
            line = self._line_of(image, folder)
            if line is not None:
                found += 1
                self._images[line.number] += 1
                yield image._replace(class_name=line.label)
                continue
            left += 1
            if not partial:
                self._faults.add(f"{image.path} (no line)")
        if left and named and not partial:
            self._lacking.append(shlex.quote(request.spec))
        if left and not found:
            what = f"any of the {left} images" if left > 1 else "the image"
            its = "".join(f"; its names are as {line.path}" for line in self._lines[:1])
            raise DataError(
                f"{self.path}: has no line for {what} of {request.spec}, as {image.path}{its}"
            )
        if left and partial:
            what = counted(found, "image has", "images have")
            rest = f"{left} {'has' if left == 1 else 'have'} none: left to --unlabeled-src"
            request.report(f"{request.spec}: {what} a line in {self.path}, {rest}")

    def _in_order(self, images: "Iterable[Image]") -> "list[Image]":
        listed = sorted(images, key=lambda image: image.name)
        names = dict.fromkeys(image.name for image in listed)
        for at, (name, line) in enumerate(zip(names, self._lines, strict=False)):
            self._lines[at] = self._by_name[name] = line._replace(path=name)
        return listed

    def _line_of(self, image: "Image", folder: str) -> LabelLine | None:
        for name in (image.name, _stem(image.name)):
            line = self._by_name.get(name)
            if line is _SEVERAL:
                line = self._line_of_path(folder + image.path)
            if line is not None:
                return line
        return None

    def _line_of_path(self, path: str) -> LabelLine | None:
        rest = _clean(path)
        while rest:
            if line := self._by_path.get(rest) or self._by_path.get(_stem(rest)):
                return line
            rest = rest.partition("/")[2]
        return None

    def require_fit(self) -> None:
        """DataError unless the lines fit the images of all sources one to one.

        If the file is for validation images, too, each fits an image of either or of both.
        """
        for line in self._lines:
            count = self._images[line.number]
            if not (count or self._earlier is None or self._earlier[line.number]):
                self._faults.add(f"{line.path or line.label} (line {line.number}, no image)")
            elif count > 1:
                self._faults.add(f"{line.path} ({count} images)")
        if self._faults.count:
            what = counted(self._faults.count, "name does not fit", "names do not fit")
            sources, lacking = " + ".join(self._specs), " ".join(self._lacking)
            hint = f"; to take the others as unlabeled images, add --unlabeled-src {lacking}"
            raise DataError(
                f"{self.path}: {what} the images of {sources}: {self._faults}"
                f"{hint if lacking else ''}"
            )


def _clean(path: str) -> str:
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _forms(path: str) -> Iterable[str]:
    """Return a path as it is, and as one of Windows."""
    return dict.fromkeys((_clean(path), _clean(path.replace("\\", "/"))))


def _stem(path: str) -> str:
    """Return a path without the suffix of its last part."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)
