"""The policies: how operations, signs and centers are drawn, and what follows the operations."""

import warnings
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.auto_aug import rand_augment
from nvidia.dali.data_node import DataNode
from scipy.stats import chisquare

from mpl_fast.config import DataConfig
from mpl_fast.config.command_line import parse
from mpl_fast.data import pipelines, randaugment
from mpl_fast.data.grouped import BY_CODE, CODES, MATRICES
from mpl_fast.data.operations import Apply, Draws, Operation
from mpl_fast.training.introduction import _warnings
from tests.data.operations_by_pillow import CIFAR, Pixels, by_code, photographs, strong_views
from tests.tiny_run import ROOT

# A strength of 0.8 times the nominal one, at which no two operations have the same result.
DISTINCT = replace(CIFAR, magnitude=8.0, num_ops=1)
MPL = pytest.mark.parametrize("policy", ["mpl", "mpl_branched"])


def test_every_choice_has_a_function() -> None:
    hints = get_type_hints(DataConfig)
    assert set(randaugment.POLICIES) == set(get_args(hints["policy"]))
    assert set(pipelines.TRAIN_CROPS) == set(get_args(hints["crop"]))
    assert set(pipelines.DECODED_CROPS) == set(pipelines.EVAL_CROPS) == set(pipelines.TRAIN_CROPS)
    assert set(pipelines.INTERPOLATIONS) == set(get_args(hints["interpolation"]))


def test_every_operation_is_drawn_evenly_and_really_applied() -> None:
    """By what became of a photograph: 10,000 of them, one layer."""
    image = photographs(32)[0]
    forced = by_code(DISTINCT, [image] * CODES, list(range(CODES)))
    signed = {
        operation.name
        for operation, minus, plus in zip(BY_CODE, forced[::2], forced[1::2], strict=True)
        if not np.array_equal(minus, plus)
    }
    assert signed >= {operation.name for operation in BY_CODE[: len(MATRICES)]}
    names = [f"{o.name}{sign if o.name in signed else ''}" for o in BY_CODE for sign in "-+"]
    known = {result.tobytes(): name for result, name in zip(forced, names, strict=True)}
    known = {result: name for result, name in known.items() if name != "Cutout"}
    known[image.tobytes()] = "none"
    assert len(known) == len(BY_CODE) + len(signed)  # all different, with "none" for Cutout
    views = strong_views(image, DISTINCT, rounds=20)
    found = Counter(known.get(view.tobytes()) or cutout(view, image) for view in views)
    assert abs(found.pop("none") / len(views) - 0.5) < 0.02
    total = found.total()
    assert set(found) == set(names)
    each = 1 / len(BY_CODE)
    expected = [total * (each / 2 if name[:-1] in signed else each) for name in found]
    assert chisquare(list(found.values()), expected).pvalue > 0.001


def cutout(view: Pixels, image: Pixels) -> str:
    """Cutout, if the view is the image but for one gray rectangle."""
    rows, columns = np.nonzero((view != image).any(axis=-1))
    patch = view[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (patch == 128).all()
    return "Cutout"


def mark(number: int) -> Apply:
    """Appends a number to the gray level as a digit of base 64."""
    return lambda image, draws, config: fn.cast_like(image * 64 + (number + 1), image)


def mark_code(image: DataNode, code: DataNode, center: DataNode, config: DataConfig) -> DataNode:
    return fn.cast_like(image * 64 + (code + 1), image)


def drawn(policy: str, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.int64]:
    """Of 20,000 images: numbers or codes of both layers, -1 where one is not applied; (n, 2)."""
    marks = tuple(Operation(o.name, o.number, mark(o.number)) for o in BY_CODE)
    monkeypatch.setattr(randaugment, "OPERATIONS", marks)
    monkeypatch.setattr(randaugment, "apply_code", mark_code)
    config = DataConfig(policy=policy, num_ops=2, image_size=1)  # type: ignore[arg-type]
    marked = strong_views(np.zeros((1, 1, 3), np.int32), config, rounds=40)
    digits = marked[:, 0, 0, 0].astype(int)
    return np.stack([digits // 64, digits % 64], axis=1) - 1


@pytest.mark.parametrize(
    ("policy", "choices", "near"), [("mpl", CODES, 0.008), ("mpl_branched", len(BY_CODE), 0.012)]
)
def test_layers_draw_evenly_and_share_one_probability_per_image(
    policy: str, choices: int, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = drawn(policy, monkeypatch)
    applied = (both >= 0).sum(axis=1)
    # E[p^2] of p ~ U(0.2, 0.8) is 0.28; two independent probabilities would give 0.25.
    assert abs((applied == 0).mean() - 0.28) < 0.012
    assert abs((applied == 2).mean() - 0.28) < 0.012
    found = both[both >= 0]
    counts = np.bincount(found, minlength=choices)
    assert chisquare(counts).pvalue > 0.001
    twice = both[applied == 2]
    repeated = (twice[:, 0] == twice[:, 1]).mean()
    assert abs(repeated - 1 / choices) < near  # with replacement


def reveal(image: DataNode, draws: Draws, config: DataConfig) -> DataNode:
    return fn.cast_like(image * 0 + 100 + 50 * draws.sign() + draws.center, image)


def reveal_center(
    image: DataNode, code: DataNode, center: DataNode, config: DataConfig
) -> DataNode:
    return fn.cast_like(image * 0 + 150 + 0 * code + center, image)


@MPL
def test_signs_and_centers_are_drawn_evenly(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of policy mpl are in its codes."""
    monkeypatch.setattr(randaugment, "OPERATIONS", (Operation("reveal", 0, reveal),))
    monkeypatch.setattr(randaugment, "apply_code", reveal_center)
    config = DataConfig(policy=policy, num_ops=1, image_size=8)  # type: ignore[arg-type]
    seen = strong_views(np.zeros((1, 1, 2), np.uint8), config, rounds=12)[:, 0, 0].astype(int)
    applied = seen[seen[:, 0] > 0]
    assert abs(len(applied) / len(seen) - 0.5) < 0.03
    if policy == "mpl_branched":
        assert abs((applied[:, 0] >= 150).mean() - 0.5) < 0.04
    for axis in (0, 1):
        counts = np.bincount(applied[:, axis] % 50, minlength=8)
        assert len(counts) == 8
        assert counts.min() > len(applied) / 8 * 0.8


def test_final_cutout_grays_one_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(randaugment.POLICIES, "mpl", lambda image, config: image)
    config = DataConfig(image_size=32, final_cutout=8)
    views = strong_views(np.zeros((32, 32, 3), np.uint8), config, rounds=1)
    for view in views:
        rows, columns = np.nonzero(view[:, :, 0] == 128)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # one rectangle
        assert 8 <= height <= 16
        assert 8 <= width <= 16
        assert (view.astype(int).sum(axis=(0, 1)) == 128 * height * width).all()


@pytest.mark.slow
def test_dali_policy_stops_at_level_10_and_grows_below_without_warnings() -> None:
    image = photographs(32)[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        at = {
            level: strong_views(image, replace(CIFAR, policy="dali", magnitude=level, num_ops=1), 1)
            for level in (2.0, 10.0, 17.0)
        }
    assert caught == []
    assert np.array_equal(at[10.0], at[17.0])
    weak, full = (np.abs(at[level].astype(int) - image).mean() for level in (2.0, 10.0))
    assert 1 < weak < 0.8 * full


def test_only_deprecations_within_dalis_policy_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(image: DataNode, **options: object) -> DataNode:
        warnings.warn("kept", RuntimeWarning, stacklevel=1)
        warnings.warn("hidden", DeprecationWarning, stacklevel=1)
        return image

    monkeypatch.setattr(rand_augment, "rand_augment", noisy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strong_views(photographs(32)[0], replace(CIFAR, policy="dali"), 1)
        warnings.warn("mine", DeprecationWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["kept", "mine"]


TRANSLATION = "a translation is by 170 pixels (data.translate 100)"
CUTOUT = "a cutout is 136 pixels wide (data.cutout 40)"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (DataConfig(image_size=171), ""),
        (DataConfig(image_size=170), TRANSLATION),
        (
            DataConfig(image_size=170, translate=-100),
            "a translation is by 170 pixels (data.translate -100)",
        ),
        (DataConfig(image_size=137), TRANSLATION),
        (DataConfig(image_size=136, translate=4), CUTOUT),
        (DataConfig(image_size=64), f"{TRANSLATION} and {CUTOUT}"),
        (DataConfig(image_size=64, policy="mpl_branched"), f"{TRANSLATION} and {CUTOUT}"),
        (DataConfig(image_size=64, magnitude=3), ""),
        (DataConfig(image_size=64, num_ops=0), ""),
        (DataConfig(image_size=100, policy="dali"), TRANSLATION.replace("170", "100")),
        (DataConfig(image_size=101, policy="dali"), ""),
        (DataConfig(image_size=64, policy="dali", magnitude=6, cutout=200), ""),
    ],
)
def test_operations_that_leave_nothing_are_a_warning(config: DataConfig, found: str) -> None:
    begin = f"strong views can be all gray: at data.magnitude 17 {found}, and data.image_size is "
    warning = randaugment.gray_views(config)
    assert warning.startswith(f"{begin}{config.image_size}; lower") if found else warning == ""


@pytest.mark.parametrize(("labeled_view", "warned"), [("weak", False), ("strong", True)])
def test_strong_views_of_labeled_images_are_warned_of(labeled_view: str, warned: bool) -> None:
    given = ["--recipe", "supervised", "--data.root", "REC", "--run-dir", "RUN"]
    given += ["--data.image-size", "32", "--data.labeled-view", labeled_view]
    given += ["--model.pretrained", "timm"]  # no warnings about the network
    algorithm = cast(Any, SimpleNamespace(learners={}))
    found = [text[:28] for text in _warnings(parse(given), algorithm)]
    assert found == (["strong views can be all gray"] if warned else [])


def test_no_shipped_config_leaves_nothing() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        given = ["--config", str(file), "--data.root", "REC", "--run-dir", "RUN"]
        config = parse(given, for_training=False)
        weak_only = config.algorithm.labeled_only and config.data.labeled_view == "weak"
        assert weak_only or not randaugment.gray_views(config.data), file
