"""What a network does not take is one line before a run begins, and nothing else is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from mpl_fast.config import DataConfig, FixMatchConfig, ModelConfig, RunConfig, SupervisedConfig
from mpl_fast.config.command_line import parse
from mpl_fast.errors import ConfigError
from mpl_fast.training.trial import check_evaluation, check_training, memory_errors
from tests.tiny_run import ROOT, arguments, train_here


def config(name: str, side: int, labeled: int = 2) -> RunConfig:
    return RunConfig(
        labeled_batch=labeled,
        unlabeled_batch=4,
        model=ModelConfig(name=name),
        data=DataConfig(image_size=side),
        algorithm=SupervisedConfig(),
    )


@pytest.mark.parametrize(
    ("name", "side", "labeled"),
    [
        ("vit_tiny_patch16_224", 32, 1),
        ("swin_tiny_patch4_window7_224", 96, 1),
        ("levit_128", 32, 2),
        ("resnet18", 64, 1),  # the last batch norm has 2 x 2 values of the one image
        ("convlarge", 12, 2),
    ],
)
def test_what_works_is_not_refused(name: str, side: int, labeled: int) -> None:
    check_training(config(name, side, labeled), 10, 1)


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_can_train(file: Path) -> None:
    given = ["--config", str(file), "--data.root", "REC", "--run-dir", "RUN"]
    check_training(parse(given, for_training=False), 10, 1)


@pytest.mark.parametrize(
    ("name", "side", "words"),
    [
        ("convlarge", 8, "does not take images of 8 pixels: set data.image_size 32, for which"),
        ("inception_v3", 32, "does not take images of 32 pixels: set data.image_size 299"),
        ("levit_128", 200, "does not take images of 200 pixels: set data.image_size 224"),
        ("gemma4_vit_167m_enc", 224, r"take another \(TypeError: .* argument 'drop_rate'"),
    ],
)
def test_what_does_not_fit_names_what_does(name: str, side: int, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.name {name} .*{words}") as training:
        check_training(config(name, side), 10, 1)
    assert "\n" not in str(training.value)
    with pytest.raises(ConfigError, match=f"^model.name {name} "):
        check_evaluation(config(name, side), 10)


def test_a_batch_of_one_in_batch_norm() -> None:
    """Where it has one value for each channel; not if batch norm is frozen, or in evaluation."""
    one = config("resnet18", 32, labeled=2)
    with pytest.raises(ConfigError, match=r"raise labeled_batch to two or more .*ValueError: Exp"):
        check_training(one, 10, world=2)
    check_training(one, 10, world=1)
    check_training(dataclasses.replace(one, model=ModelConfig(name="resnet18", frozen=True)), 10, 2)
    check_training(dataclasses.replace(one, model=ModelConfig(name="resnet18", norm="sync")), 10, 2)
    check_evaluation(one, 10)
    split = dataclasses.replace(one, microbatches=2, algorithm=FixMatchConfig(bn_batches="split"))
    check_training(split, 10, world=1)
    with pytest.raises(ConfigError, match="raise labeled_batch or unlabeled_batch to two or more"):
        check_training(split, 10, world=2)


def test_a_network_that_is_no_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mpl_fast.training.trial.build_network", lambda *_, **__: torch.nn.Identity()
    )
    with pytest.raises(ConfigError, match=r"its output is \(2, 3, 8, 8\), not \(2, 10\)"):
        check_training(config("resnet18", 8), 10, 1)


@pytest.mark.slow
def test_full_memory_names_the_options_that_help(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has")

    monkeypatch.setattr("mpl_fast.training.run.train_step", step)
    done = train_here(*arguments(tmp_path / "run", tiny_rec))
    assert done.returncode == 2
    line = (
        "memory is full (OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 "
        "has): lower --labeled-batch (now 4), or lower --unlabeled-batch (now 8), or raise "
        "--microbatches (now 1), or set --algorithm.teacher_graph recompute, or lower --eval-batch "
        "(now 16) if it was evaluating; the same command with --dry-run prints what a step needs"
    )
    assert done.stderr == f"train: error: {line}\n"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", line)
    assert re.search(
        r"checkpoints have [\d.]+ MB each, at most 3 at a time: [\d.]+ MB; ", done.stdout
    )


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (MemoryError(), True),
        (ValueError("out of memory"), False),
    ],
)
def test_what_full_memory_is(error: Exception, full: bool) -> None:
    with pytest.raises(ConfigError if full else type(error)), memory_errors(RunConfig()):
        raise error
