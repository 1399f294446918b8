"""Predictions as a file: Parquet, CSV or JSON lines; and confident ones as a labels file."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mpl_fast.errors import ConfigError

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a spreadsheet takes a cell for, by OWASP
NEEDS_PYARROW = "needs pyarrow: pip install 'mpl_fast[parquet]', or write .csv or .jsonl"


@dataclass(frozen=True)
class Part:
    """Predictions of consecutive images; of those with an error, the other values mean nothing."""

    names: Sequence[str]
    labels: NDArray[np.int64]
    """(N, k), the most probable first."""
    probabilities: NDArray[np.float32]
    """(N, k)."""
    logits: NDArray[np.float32] | None
    """(N, C)."""
    features: NDArray[np.float32] | None
    """(N, F)."""
    errors: Mapping[int, str]
    """By row."""


Writer = Callable[[Path, Iterable[Part], Sequence[str]], None]


def writer_of(out: Path, *, vectors: bool) -> Writer:
    """What writes a file of this suffix, with logits or features if `vectors`.

    Raises `ConfigError` for another suffix, CSV with vectors, and Parquet without pyarrow.
    """
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: its suffix must be one of {', '.join(WRITERS)}")
    if out.suffix == ".csv" and vectors:
        raise ConfigError(f"--out {out}: CSV has no lists: write --logits, --features to .parquet")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"--out {out}: parquet {NEEDS_PYARROW}") from error
    return WRITERS[out.suffix]


def escaped(cell: str) -> str:
    """The text of a CSV cell, after ' if a spreadsheet would compute it."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def visible(text: str) -> str:
    r"""Text that is UTF-8: of a file name that is not, the bytes as ``\xb1``."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_labels(out: Path, kept: Mapping[str, str], names: Iterable[str]) -> None:
    """Writes a labels file for `make_rec.py pack`: the class of each kept image.

    A line fits every image of its file name, so other `names` with that of a kept one are listed
    with class -1, which is none. A name that a spreadsheet would compute begins with ./ there.
    """
    ends = {_end(name) for name in kept}
    others = (name for name in names if name not in kept and {_end(name), _stem(name)} & ends)
    with _text_file(out) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("image", "label"))
        for name, label in (*kept.items(), *((name, "-1") for name in others)):
            rows.writerow((f"./{name}" if name.startswith(FORMULA) else name, label))


def _end(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return _end(path).rpartition(".")[0]


def _write_csv(out: Path, parts: Iterable[Part], classes: Sequence[str]) -> None:
    with _text_file(out) as file:
        rows = csv.writer(file, lineterminator="\n")
        for at, part in enumerate(parts):
            ranks = range(2, part.labels.shape[1] + 1)
            others = [f"{title}_{rank}" for rank in ranks for title in ("class", "probability")]
            if at == 0:
                rows.writerow(["image", "label", "class", "probability", *others, "error"])
            for row, name in enumerate(part.names):
                cells: list[object] = [""] * (3 + len(others))
                if row not in part.errors:
                    pairs = zip(part.labels[row], part.probabilities[row], strict=True)
                    ranked = [(escaped(classes[label]), str(p)) for label, p in pairs]
                    cells = [part.labels[row, 0], *(cell for pair in ranked for cell in pair)]
                rows.writerow([escaped(name), *cells, escaped(part.errors.get(row, ""))])


def _write_jsonl(out: Path, parts: Iterable[Part], classes: Sequence[str]) -> None:
    with _text_file(out) as file:
        for part in parts:
            for row in _columns_by_row(part, classes):
                file.write(json.dumps(row) + "\n")


def _write_parquet(out: Path, parts: Iterable[Part], classes: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, text = pa.float32(), pa.string()
    kinds = {"image": text, "label": pa.int32(), "class": text, "probability": number}
    kinds |= {"top_classes": pa.list_(text), "top_probabilities": pa.list_(number), "error": text}
    writer: Any = None
    try:
        for part in parts:
            columns = _columns(part, classes)
            for name in ("logits", "features"):
                if name in columns:
                    kinds[name] = pa.list_(number, getattr(part, name).shape[1])
            schema = pa.schema(
                [(name, kinds[name]) for name in columns],
                {"classes": json.dumps([visible(name) for name in classes])},
            )
            writer = writer or pq.ParquetWriter(out, schema)
            writer.write_table(pa.table(columns, schema))
    finally:
        if writer:
            writer.close()


def _columns(part: Part, classes: Sequence[str]) -> dict[str, list[Any]]:
    """Values by column and row; None beside an error."""
    names = [visible(name) for name in classes]
    good = [row not in part.errors for row in range(len(part.names))]

    def of_good(values: Iterable[Any]) -> list[Any]:
        return [value if ok else None for value, ok in zip(values, good, strict=True)]

    columns = {
        "image": [visible(name) for name in part.names],
        "label": of_good(part.labels[:, 0].tolist()),
        "class": of_good(names[label] for label in part.labels[:, 0]),
        "probability": of_good(part.probabilities[:, 0]),
        "top_classes": of_good([names[label] for label in row] for row in part.labels),
        "top_probabilities": of_good(part.probabilities),
    }
    for name, values in (("logits", part.logits), ("features", part.features)):
        if values is not None:
            columns[name] = of_good(values)
    errors = (part.errors.get(row) for row in range(len(good)))
    return columns | {"error": [error and visible(error) for error in errors]}


def _columns_by_row(part: Part, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = _columns(part, classes)
    for values in zip(*columns.values(), strict=True):
        yield {name: _plain(value) for name, value in zip(columns, values, strict=True)}


def _plain(value: Any) -> Any:
    """For JSON, float32 with the fewest digits that give it back."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value]
    return float(str(value)) if isinstance(value, np.float32) else value


def _text_file(out: Path) -> TextIO:
    return out.open("w", encoding="utf-8", errors="surrogateescape", newline="")


WRITERS: dict[str, Writer] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
