"""Reads a recorded trajectory of MPL-pytorch's step, and says which of its keys is wrong.

The file is JSON: `cfg` (sizes and knobs), `data` (`teacher` and `student`: the first weights, each
[fc1.weight, fc1.bias, fc2.weight, fc2.bias]; `batches`: xl, y, xw, xs of each step) and `runs`,
named such as "bn=False,sign=kekmodel", each with a `log` row for each step and last weights.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpl_fast.errors import ConfigError

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]
Row = dict[str, Array]

INITIAL = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
NUMBERS = ["step", "s_lr", "t_lr", "uda_weight", "mask", "t_loss_l", "t_loss_u", "s_loss_l_old"]
NUMBERS += ["s_loss", "s_grad_norm", "s_loss_l_new", "dot_product", "t_loss_mpl", "t_loss"]
NUMBERS += ["t_grad_norm"]
NORMS = ("s_grad_norm", "t_grad_norm")  # may be null where nothing is clipped
STEPS = "cfg.steps"
NETWORKS = ("teacher", "student", "ema")
SIGNS = {"kekmodel": 1.0, "correct": -1.0}  # of new - old
NORM_FLAGS = {"False": False, "True": True}


@dataclass(frozen=True)
class Knobs:
    """`cfg` of the file: sizes, and how both networks are trained."""

    D: int
    H: int
    C: int
    BL: int
    mu: int
    steps: int
    total_steps: int
    warmup: int
    wait: int
    uda_steps: int
    t_lr: float
    s_lr: float
    momentum: float
    wd: float
    ls: float
    T: float
    thr: float
    lam: float
    ema: float
    clip: float
    nesterov: bool

    @property
    def unlabeled(self) -> int:
        """Rows of each unlabeled view."""
        return self.BL * self.mu


COUNTS = {"D": 1, "H": 1, "C": 1, "BL": 1, "mu": 1, "steps": 1, "total_steps": 1}
COUNTS |= {"warmup": 0, "wait": 0, "uda_steps": 0}
RANGES = {"t_lr": (0.0, math.inf), "s_lr": (0.0, math.inf), "wd": (0.0, math.inf)}
RANGES |= {"momentum": (0.0, 1.0), "ls": (0.0, math.nextafter(1.0, 0.0)), "ema": (0.0, 1.0)}
RANGES |= {"T": (1e-38, 1e38), "thr": (0.0, math.inf), "lam": (0.0, math.inf)}
RANGES |= {"clip": (0.0, math.inf)}


@dataclass(frozen=True)
class Run:
    """One recorded run: what was logged at each step, and the weights and statistics at the end."""

    name: str
    norm: bool  # batch norm behind the first layer
    sign: float  # 1: new - old, as published; -1: old - new
    log: Sequence[Row]
    finals: dict[str, Weights]  # of teacher, student and ema
    unknown: Sequence[str]  # logged quantities that nothing here computes


@dataclass(frozen=True)
class Trajectory:
    """The whole file. Arrays are float64; labels of a batch are whole numbers in [0, C)."""

    knobs: Knobs
    initial: dict[str, Weights]  # of teacher and student
    batches: Sequence[Row]  # xl (BL, D), y (BL,), xw and xs (BL * mu, D)
    runs: Sequence[Run]


def read(path: Path) -> Trajectory:
    """Raises `ConfigError`, which names the key, if anything is missing or does not fit."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise ConfigError(f"{path} is not JSON: {' '.join(str(error).split())}") from None
    file = _Part(content, str(path))
    knobs = _knobs(file.key("cfg"))
    data = file.key("data")
    initial = {name: _initial(data.key(name), knobs) for name in ("teacher", "student")}
    batches = [_batch(part, knobs) for part in data.key("batches").rows(knobs.steps, STEPS)]
    runs = [_run(name, part, knobs) for name, part in file.key("runs").items()]
    if not runs:
        raise file.key("runs").wrong("is empty: there is nothing to replay")
    return Trajectory(knobs, initial, batches, runs)


class _Part:
    """A value of the file together with its place, which errors name."""

    def __init__(self, value: Any, file: str, place: str = "") -> None:
        self.value, self._file, self._place = value, file, place

    def wrong(self, words: str) -> ConfigError:
        return ConfigError(f"{self._file}: {self._place or 'the whole'} {words}")

    def key(self, name: str) -> "_Part":
        part = _Part(None, self._file, f"{self._place}.{name}".lstrip("."))
        if not isinstance(self.value, dict):
            raise self.wrong(f"must be an object that has {name}")
        if name not in self.value:
            raise part.wrong("is missing")
        part.value = self.value[name]
        return part

    def items(self) -> list[tuple[str, "_Part"]]:
        if not isinstance(self.value, dict):
            raise self.wrong("must be an object")
        return [(n, _Part(v, self._file, f"{self._place}[{n}]")) for n, v in self.value.items()]

    def rows(self, count: int, why: str) -> list["_Part"]:
        if not isinstance(self.value, list):
            raise self.wrong(f"must be a list of {count} ({why})")
        if len(self.value) != count:
            raise self.wrong(f"must be a list of {count} ({why}), not of {len(self.value)}")
        return [_Part(v, self._file, f"{self._place}[{i}]") for i, v in enumerate(self.value)]

    def array(self, *shape: int) -> Array:
        try:
            found = np.array(self.value)
        except ValueError:
            raise self.wrong(f"must have shape {shape}, but its rows differ in length") from None
        if found.shape != shape and found.dtype.kind in "iuf":
            raise self.wrong(f"must have shape {shape}, not {found.shape}")
        if found.dtype.kind not in "iuf":
            raise self.wrong(f"must be numbers of shape {shape}" if shape else "must be a number")
        if not np.isfinite(found).all():
            raise self.wrong("must be finite numbers")
        return found.astype(np.float64)

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        value = float(self.array())
        if not low <= value <= high:
            raise self.wrong(f"must lie in [{low}, {high}], not be {value}")
        return value

    def count(self, least: int) -> int:
        value = self.number(least)
        if value != int(value):
            raise self.wrong(f"must be a whole number, not {value}")
        return int(value)

    def flag(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.wrong("must be true or false")
        return self.value


def _knobs(cfg: _Part) -> Knobs:
    counts = {name: cfg.key(name).count(least) for name, least in COUNTS.items()}
    numbers = {name: cfg.key(name).number(*bounds) for name, bounds in RANGES.items()}
    values: dict[str, Any] = {**counts, **numbers}
    return Knobs(**values, nesterov=cfg.key("nesterov").flag())


def _initial(part: _Part, knobs: Knobs) -> Weights:
    shapes = _shapes(knobs, norm=False)
    rows = part.rows(len(INITIAL), ", ".join(INITIAL))
    return {n: row.array(*shapes[n]) for n, row in zip(INITIAL, rows, strict=True)}


def _shapes(knobs: Knobs, norm: bool) -> dict[str, tuple[int, ...]]:
    """Of every weight and statistic of the network."""
    hidden = (knobs.H,)
    shapes = {"fc1.weight": (knobs.H, knobs.D), "fc1.bias": hidden}
    if norm:
        names = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"bn1.{name}": hidden for name in names}
        shapes["bn1.num_batches_tracked"] = ()
    return shapes | {"fc2.weight": (knobs.C, knobs.H), "fc2.bias": (knobs.C,)}


def _batch(part: _Part, knobs: Knobs) -> Row:
    views = {"xl": knobs.BL, "xw": knobs.unlabeled, "xs": knobs.unlabeled}
    batch = {name: part.key(name).array(rows, knobs.D) for name, rows in views.items()}
    return {**batch, "y": _classes(part.key("y"), knobs.BL, knobs.C)}


def _classes(part: _Part, rows: int, classes: int) -> Array:
    found = part.array(rows)
    if ((found != found.round()) | (found < 0) | (found >= classes)).any():
        raise part.wrong(f"must be classes from 0 to {classes - 1}")
    return found


def _run(name: str, part: _Part, knobs: Knobs) -> Run:
    options = dict(word.strip().partition("=")[::2] for word in name.split(","))
    norm, sign = NORM_FLAGS.get(options.get("bn", "")), SIGNS.get(options.get("sign", ""))
    if norm is None or sign is None or len(options) != 2:
        raise part.wrong("must be named bn=False or bn=True, then sign=kekmodel or sign=correct")
    if norm and knobs.BL == 1:
        raise part.wrong("cannot be: batch norm needs more than the 1 labeled row of cfg.BL")
    rows = part.key("log").rows(knobs.steps, STEPS)
    log = [_row(row, knobs) for row in rows]
    networks = [n for n in NETWORKS if not _lacks(part, n, f"{n}_final", knobs)]
    shapes = _shapes(knobs, norm)
    finals = {
        n: {key: part.key(f"{n}_final").key(key).array(*shape) for key, shape in shapes.items()}
        for n in networks
    }
    known = {*NUMBERS, "hard", *(f"{n}_sum_sumsq" for n in NETWORKS)}
    unknown = sorted({key for row in rows for key in row.value if key not in known})
    return Run(name, norm, sign, log, finals, unknown)


def _row(part: _Part, knobs: Knobs) -> Row:
    row: Row = {}
    for name in NUMBERS:
        value = part.key(name)
        if not (name in NORMS and value.value is None and not knobs.clip):
            row[name] = value.array()
    row["hard"] = _classes(part.key("hard"), knobs.unlabeled, knobs.C)
    for network in NETWORKS:
        name = f"{network}_sum_sumsq"
        if not _lacks(part, network, name, knobs):
            row[name] = part.key(name).array(2)
    return row


def _lacks(part: _Part, network: str, name: str, knobs: Knobs) -> bool:
    """Without a decay there need not be an average."""
    return network == "ema" and not knobs.ema and part.value.get(name) is None
