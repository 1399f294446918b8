"""Top-1, top-5 and the count, by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpl_fast.algorithms.base import EvalEnsemble
from mpl_fast.config import DataConfig, RunConfig
from mpl_fast.config.command_line import parse
from mpl_fast.data.manifest import Manifest, Split, read_manifest
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import ConfigError, DataError
from mpl_fast.training.build import eval_loader
from mpl_fast.training.evaluate import evaluate, evaluate_run
from mpl_fast.training.metrics import QueueLimiter
from tests.tiny_run import arguments


class Fixed:
    """A learner whose logits are the images themselves."""

    def infer_average(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class One:
    """An algorithm that evaluates that learner."""

    learners: dict[str, object] = {}  # noqa: RUF012
    eval_ensemble = EvalEnsemble([Fixed()])  # type: ignore[list-item]


def images(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


BATCHES = [
    # right at once; right among five; wrong
    (
        images([9, 1, 2, 3, 4, 5], [5, 9, 8, 7, 6, 1], [0, 9, 8, 7, 6, 5]),
        torch.tensor([0, 0, 0]),
        3,
    ),
    # the second row is padding
    (images([0, 9, 0, 0, 0, 0], [0, 9, 0, 0, 0, 0]), torch.tensor([1, 1]), 1),
]


def manifest(records: int) -> Manifest:
    val = Split(records, (), Path("val.idx"), Path("val.lst"), 100)
    return Manifest(Path("REC"), ("a",) * 6, {"val": val}, "")


def test_counts_what_counts() -> None:
    found = evaluate(One(), BATCHES, manifest(4))  # type: ignore[arg-type]
    assert found == {"top1": 50.0, "top5": 75.0, "count": 4}


def test_the_queue_is_limited_after_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(QueueLimiter, "step", lambda limiter: steps.append("step"))
    batches = (steps.append("batch") or batch for batch in BATCHES)  # type: ignore[func-returns-value]
    evaluate(One(), batches, manifest(4))  # type: ignore[arg-type]
    assert steps == ["batch", "step", "batch", "step"]


def test_a_missing_image_is_an_error() -> None:
    with pytest.raises(DataError, match="saw 4 images, the manifest lists 5"):
        evaluate(One(), BATCHES, manifest(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [-1, 6, 1 << 40, -(1 << 63)])
def test_a_label_of_no_class_is_an_error(label: int) -> None:
    batches = [*BATCHES, (BATCHES[1][0], torch.tensor([label, label]), 1)]
    with pytest.raises(DataError, match=r"^REC: 1 labels of split val .* 0 to 5: .* verify REC`"):
        evaluate(One(), batches, manifest(5))  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "rows"), [(1, 50), (3, 17), (60, 1)])
def test_a_batch_of_evaluation_is_at_most_the_split(tiny_rec: Path, world: int, rows: int) -> None:
    config = RunConfig(data=DataConfig(image_size=16, threads=1), eval_batch=99_999_999)
    env = DistEnv(0, world, torch.device("cpu"))
    ((found, _, _),) = eval_loader(config, read_manifest(tiny_rec), env)
    assert len(found) == rows


def test_a_network_that_does_not_take_the_images(tiny_rec: Path, tmp_path: Path) -> None:
    options = ["--model.name", "convlarge", "--data.image_size", "8"]
    with pytest.raises(ConfigError, match=r"convlarge .* 8 pixels: set data\.image_size 32"):
        evaluate_run(parse([*arguments(tmp_path / "run", tiny_rec), *options]))
