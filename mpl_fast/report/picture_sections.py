"""The sections of a report that show images: mistakes, training views, the map of features."""

import hashlib
import time
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from mpl_fast.data.split_images import SplitImages
from mpl_fast.report import figures, pictures
from mpl_fast.report.embedding import FEWEST, embed
from mpl_fast.report.names import all_shown, shown
from mpl_fast.report.sections import Detail
from mpl_fast.report.verdict import percent
from mpl_fast.training.console import duration

MISTAKES = 24
VIEWED, DRAWS = 6, 4  # images, and strong views of each


def _split_images(detail: Detail, split: str) -> SplitImages:
    assert detail.network is not None
    return SplitImages(detail.network.manifest.splits[split])


def mistakes(detail: Detail) -> list[dict[str, str]]:
    """The pictures with the most probable wrong class, most probable first."""
    val, network = detail.val, detail.network
    if val is None or network is None:
        return []
    wrong = np.flatnonzero(~val.hits)
    if not len(wrong):
        detail.gone["mistakes"] = "every validation image is right"
        return []
    worst = wrong[np.argsort(-val.confidence[wrong], kind="stable")][:MISTAKES]
    images = detail.attempt(("mistakes",), lambda: _split_images(detail, "val"))
    if images is None:
        return []
    found, tiles = [], []
    for place in worst:
        picture = pictures.thumbnail(images.image(int(place)))
        truth, guess = (
            shown(network.classes[label], 48) for label in (val.labels[place], val.best[place])
        )
        probability = percent(float(val.confidence[place]), 1)
        found.append(
            {"uri": pictures.data_uri(picture), "truth": truth, "guess": guess}
            | {"percent": probability, "file": shown(images.names[int(place)])}
        )
        tiles.append((picture, f"{shown(guess, 16)} {probability}\nis {shown(truth, 16)}"))
    title = "Most certain mistakes"
    detail.charts.append(figures.picture_grid("mistakes", title, tiles, columns=6))
    return found


def views(detail: Detail) -> dict[str, Any]:
    """Rows of the views of training images, as the run's options make them."""
    nothing: dict[str, Any] = {"views": [], "view_heads": []}
    network = detail.network
    if network is None:
        return nothing
    from mpl_fast.data.contact_sheet import draw_rows, titles  # late: imports DALI

    def draw() -> dict[str, Any]:
        config, split = network.config, network.manifest.splits["unlabeled"]
        network.say(f"{network.run}: drawing views")
        rows = draw_rows(config.data, split, min(VIEWED, split.records), DRAWS, seed=config.seed)
        tiles = [pictures.jpeg(pictures.reduced(tile), 90) for _, row in rows for tile in row]
        stored = {f"tile_{number}": tile for number, tile in enumerate(tiles)}
        return {"labels": np.array([label for label, _ in rows]), **stored}

    def stored() -> dict[str, Any]:
        key = [
            repr(network.config.data),
            network.config.seed,
            network.manifest.content,
            VIEWED,
            DRAWS,
        ]
        return network.cached("views", key, draw)

    drawn = detail.attempt(("views",), stored)
    if drawn is None:
        return nothing
    heads, manifest = titles(DRAWS), network.manifest
    tiles, rows = [], []
    for number, label in enumerate(drawn["labels"].tolist()):
        name = manifest.class_text(label) if label >= 0 else "no label"
        first = number * len(heads)
        row = [drawn[f"tile_{first + i}"].tobytes() for i in range(len(heads))]
        rows.append({"name": shown(name, 48), "uris": [pictures.uri_of(tile) for tile in row]})
        tiles += [(pictures.thumbnail(t), head) for t, head in zip(row, heads, strict=True)]
    detail.charts.append(figures.picture_grid("views", "Training views", tiles, len(heads)))
    return {"views": rows, "view_heads": heads}


def feature_map(detail: Detail) -> dict[str, Any]:
    """The section on features: the map, and what its script shows of each point."""
    nothing: dict[str, Any] = {"map_chart": None, "map_data": "", "sheet": ""}
    val, network = detail.val, detail.network
    if val is None or network is None:
        return nothing
    parts = [("val", val)]
    if detail.unlabeled is not None and len(detail.unlabeled.places):
        parts.append(("unlabeled", detail.unlabeled))
    features = np.concatenate([found.features for _, found in parts])
    if len(features) < FEWEST:
        detail.gone["features"] = f"a map needs {FEWEST} images, and --points took {len(features)}"
        return nothing
    labels, guesses, confidence = (
        np.concatenate([getattr(found, name)[found.places] for _, found in parts])
        for name in ("labels", "best", "confidence")
    )

    def compute() -> dict[str, Any]:
        network.say(f"{network.run}: t-SNE of {len(features):,} images")
        began = time.perf_counter()
        images = [(split, _split_images(detail, split), found.places) for split, found in parts]
        tiles = [(split, int(place)) for _, split, places in images for place in places]
        content = {"points": embed(features), "sheet": pictures.jpeg(pictures.sheet(tiles))}
        network.say(f"{network.run}: t-SNE took {duration(time.perf_counter() - began)}")
        return content

    key = [pictures.TILE, pictures.ACROSS, hashlib.sha256(features.tobytes()).hexdigest()]
    stored = detail.attempt(("features",), lambda: network.cached("map", key, compute))
    if stored is None:
        return nothing
    own = np.arange(len(val.places), len(features))
    chart, placed = figures.feature_map(
        stored["points"], labels, guesses, network.classes, unlabeled=own
    )
    points = [
        [*place, int(truth), int(guess), round(100 * float(p), 1), int(number >= len(val.places))]
        for number, (place, truth, guess, p) in enumerate(
            zip(placed.round(1).tolist(), labels, guesses, confidence, strict=True)
        )
    ]
    data = {"across": pictures.ACROSS, "names": all_shown(network.classes, 60), "points": points}
    return {
        "map_chart": detail.drawn(chart)[0],
        "map_data": htmlsafe_json_dumps(data, separators=(",", ":")),
        "sheet": pictures.uri_of(stored["sheet"].tobytes()),
    }
