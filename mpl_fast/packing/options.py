"""Options of `make_rec.py pack`: sources, splits and shards, checks and changes of images."""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from mpl_fast.packing.write.pixels import PIXEL_LIMIT

LAYOUTS = ("shared", "separate")
BALANCES = ("count", "proportional")
CLASS_ORDERS = ("name", "natural")
CHECKS = ("decode", "header", "none")
ACTIONS = {"fail": "failed", "skip": "skipped", "convert": "converted"}
DRAWN = ("labeled", "balance", "unlabeled", "split_seed")  # options that resplit has, too
DEFAULT_LABELED = {False: "10%", True: "all"}  # of a pack without and with unlabeled sources
Json = dict[str, Any]
_DRAWN_VAL = re.compile(r"[0-9][0-9.]*%|[0-9]+")


def is_drawn(val: str | None) -> bool:
    """Return whether a --val is a share (5%) or a number of training images, and no source."""
    return val is not None and bool(_DRAWN_VAL.fullmatch(val))


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How images are divided into splits and shards; each field is the option of that name."""

    labeled: str = DEFAULT_LABELED[False]
    balance: str = "count"
    unlabeled: str = "all"  # includes the labeled images, as in the official MPL code; or "rest"
    split_seed: int = 0
    layout: str = "shared"
    shards: int | None = None  # .rec files of each prefix; None: as shard_size determines
    shard_size: int = 1 << 30  # bytes
    order: str = "shuffle"  # or "list": by class and name
    shuffle_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are checked and changed; each field is the option of that name."""

    check: str = "decode"  # one of CHECKS
    on_bad: str = "fail"  # a key of ACTIONS
    short_side: int | None = None  # pixels; None keeps all sizes
    quality: int = 90  # JPEG quality of resized images, 1 to 100
    max_pixels: int = PIXEL_LIMIT  # of one image, by its header; a larger one is bad
    min_shrink: float = 1.1  # an image whose short side is less than this times short_side is kept


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """All options of `make_rec.py pack`."""

    src: tuple[str, ...]
    out: Path
    val: str | None = None  # a source, or how many images of src: see is_drawn
    val_seed: int | None = None  # draws those; None: 0
    unlabeled_src: tuple[str, ...] = ()  # training images without labels
    root: Path | None = None  # of the paths in a list
    labels: Path | None = None  # of the images in src outside class folders
    val_labels: Path | None = None
    class_from: str | None = None  # which folder is the class: top, leaf or a number
    class_order: str = "name"  # one of CLASS_ORDERS: of classes that nothing else numbers
    classes: Path | None = None  # a line for each label: name, title
    split: SplitOptions = field(default_factory=SplitOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    part: tuple[int, int] | None = None  # (i, n): every n-th shard, from number i - 1 on
    engine: str = "local"
    processes: int = 1
    read_threads: int = 0
    lock: bool = True  # the folder, against other processes
    force: bool = False
    quiet: bool = False

    def planned(self) -> Json:
        """Return the options that determine the content of the pack, as JSON."""
        paths = {name: getattr(self, name) for name in ("root", "labels", "val_labels")}
        return {
            "src": list(self.src),
            "val": self.val,
            # Not in packs without: their tables are as they were before these options.
            **({"val_seed": self.val_seed or 0} if is_drawn(self.val) else {}),
            **({"unlabeled_src": list(self.unlabeled_src)} if self.unlabeled_src else {}),
            **({"class_from": self.class_from} if self.class_from else {}),
            **({"class_order": self.class_order} if self.class_order != CLASS_ORDERS[0] else {}),
            **({"classes": str(self.classes)} if self.classes else {}),
            **{name: None if path is None else str(path) for name, path in paths.items()},
            **asdict(self.split),
            **{
                name: value
                for name, value in asdict(self.image).items()
                if (name, value) != ("max_pixels", PIXEL_LIMIT)
            },
        }


_Options = TypeVar("_Options", SplitOptions, ImageOptions, PackOptions)


def options_from(kind: type[_Options], values: Json) -> _Options:
    """Return options of a class, each the value of that name, or its default without one."""
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


def image_option_errors(how: ImageOptions) -> list[str]:
    """Return one line for each invalid option."""
    found = []
    if how.check not in CHECKS:
        found.append(f"--check {how.check}: must be one of {', '.join(CHECKS)}")
    if how.on_bad not in ACTIONS:
        found.append(f"--on-bad {how.on_bad}: must be one of {', '.join(ACTIONS)}")
    if how.on_bad == "convert" and how.check != "decode":
        found.append(f"--on-bad convert needs --check decode, not {how.check}")
    if how.short_side is not None and how.short_side < 1:
        found.append(f"--short-side {how.short_side}: must be at least 1 pixel")
    if not 1 <= how.max_pixels <= PIXEL_LIMIT:
        found.append(f"--max-pixels {how.max_pixels}: must be 1 to {PIXEL_LIMIT}")
    if not 1 <= how.quality <= 100:
        found.append(f"--quality {how.quality}: must be 1 to 100")
    if not 1 <= how.min_shrink < math.inf:
        found.append(f"--min-shrink {how.min_shrink}: must be at least 1")
    return found
