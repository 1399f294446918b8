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
from mpl_fast.training.evaluate import evaluate, evaluate_run, other_views
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


def test_views_are_averaged_and_the_plain_accuracy_stays() -> None:
    """Two classes by the left and right half of an image: mirrored, each is the other."""

    class Halves:
        def infer_average(self, images: Tensor) -> Tensor:
            left, right = images.chunk(2, -1)
            return torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], 1)

    algorithm = One()
    algorithm.eval_ensemble = EvalEnsemble([Halves()])  # type: ignore[list-item]
    ramp = torch.arange(4.0).expand(2, 3, 4, 4)  # class 1 by itself, undecided with its mirror
    batches = [(torch.stack([ramp[0], ramp[1].flip(-1)]), torch.tensor([1, 1]), 2)]
    plain = evaluate(algorithm, batches, manifest(2))  # type: ignore[arg-type]
    assert plain == {"top1": 50.0, "top5": 100.0, "count": 2}
    both = evaluate(algorithm, batches, manifest(2), views=2)  # type: ignore[arg-type]
    assert {**both, **plain} == both
    assert both["top1_views"] in (0.0, 100.0)  # equal probabilities: the same class for both


def test_six_views_are_shifts_by_a_pixel_with_reflected_borders() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    mirrored, *shifted = (view[0, 0] for view in other_views(image, 6))
    assert mirrored[0].tolist() == [3, 2, 1, 0]
    assert [view.shape for view in shifted] == [(3, 4)] * 4
    assert shifted[0].tolist() == [[5, 4, 5, 6], [1, 0, 1, 2], [5, 4, 5, 6]]
    assert shifted[1].tolist() == [[5, 6, 7, 6], [9, 10, 11, 10], [5, 6, 7, 6]]
    assert shifted[2].equal(shifted[0].new_tensor([[6, 7, 6, 5], [2, 3, 2, 1], [6, 7, 6, 5]]))


def test_mirrored_views_of_images_that_are_not_mirrored(tiny_rec: Path, tmp_path: Path) -> None:
    options = ["--data.flip", "false"]
    with pytest.raises(ConfigError, match=r"mirrors images.*leave out --views"):
        evaluate_run(parse([*arguments(tmp_path / "run", tiny_rec), *options]), views=2)


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
