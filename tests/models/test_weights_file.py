"""Files of weights as training codes save them, and what a pickle may not do."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm import utils
from torch import Tensor, nn

from mpl_fast import models
from mpl_fast.errors import ConfigError

NAME = "wrn_10_1"
Weights = dict[str, Tensor]


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(NAME, 5)


ONE, TWO = made(1).state_dict(), made(2).state_dict()


def below(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def taken(source: object) -> tuple[Weights, str]:
    """What a network loads, and the note about it."""
    notes: list[str] = []
    loaded = models.build(NAME, 5, pretrained=str(source), notes=notes).state_dict()
    assert notes[0].startswith(f"begins with the weights of {source}")
    return loaded, notes[0]


def is_same(loaded: Weights, expected: Weights) -> bool:
    return all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize("averaged", [True, False])
def test_a_checkpoint_of_timms_train_script(averaged: bool, tmp_path: Path) -> None:
    network, average = made(1), made(2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="x", lr=0.1, opt_betas=None, data=Path("/data"), size=(3, 4))
    timm: Any = utils
    ema = timm.ModelEmaV3(average) if averaged else None
    saver = timm.CheckpointSaver(network, optimizer, args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=np.float64(71.5))
    loaded, note = taken(tmp_path / "last.pth.tar")
    expected = TWO if averaged else network.state_dict()
    assert is_same(loaded, expected) and not is_same(loaded, ONE)
    which = "its state_dict_ema, which is averaged" if averaged else "its state_dict"
    assert f"last.pth.tar ({which}); the last layer is taken" in note
    assert is_same(taken(f"{tmp_path / 'last.pth.tar'}:state_dict")[0], network.state_dict())


OTHERS = {"criterion.weight": torch.ones(3), "metric.total": torch.ones(())}
CASES: dict[str, tuple[Any, str]] = {
    "ddp": (below("module.", ONE), "(keys below module.)"),
    "lightning": (
        {
            "pytorch-lightning_version": "2.4.0",
            "epoch": 3,
            "state_dict": below("model.", ONE) | OTHERS,
            "hyper_parameters": {"lr": 0.1},
            "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
        },
        "(its state_dict, keys below model., not criterion.weight, metric.total)",
    ),
    "compiled": ({"net": below("module._orig_mod.", ONE)}, "(its net, keys below module._orig_"),
    "swa": (below("module.", ONE) | {"n_averaged": torch.ones(())}, "module., not n_averaged)"),
    "ema": ({"model": TWO, "model_ema": ONE, "epoch": 3}, "(its model_ema, which is averaged)"),
    "other": ({"model": ONE, "scaler": {"scale": torch.ones(())}}, "(its model)"),
    "learners of others": ({"model": ONE, "learners": {"count": 3}}, "(its model)"),
    "headless": (
        {k: v for k, v in below("backbone.", ONE).items() if "head" not in k},
        "(keys below backbone.); the last layer is new: the file has none",
    ),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize("case", CASES)
def test_what_training_codes_save(case: str, zipped: bool, tmp_path: Path) -> None:
    content, about = CASES[case]
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded, note = taken(tmp_path / "w.pth")
    expected = {k: v for k, v in ONE.items() if case != "headless" or "head" not in k}
    assert is_same(loaded, expected) and about in note
    assert not is_same(loaded, TWO)


AMBIGUOUS: dict[str, tuple[Any, str, str]] = {
    "entries": ({"student": ONE, "teacher": TWO, "step": 3}, "student", "teacher"),
    "prefixes": (
        {"state_dict": below("model.", ONE) | below("ema_model.", TWO)},
        "state_dict.model",
        "state_dict.ema_model",
    ),
    "prefixes of entries": (
        {"ema": below("student.", ONE), "state:dict": below("student.", TWO)},
        "ema.student",
        "state:dict.student",
    ),
    "checkpoint": (
        {
            "learners": {
                "student": {"network": TWO, "average": ONE},
                "teacher": {"network": TWO, "average": None},
            }
        },
        "student",
        "teacher",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_one_of_several_has_to_be_named(case: str, tmp_path: Path) -> None:
    content, one, two = AMBIGUOUS[case]
    file = tmp_path / "a:b.pth"
    torch.save(content, file)
    message = f"{file} has the weights of {one} and {two}: name one as {file}:ENTRY"
    with pytest.raises(ConfigError, match=re.escape(message)):
        taken(file)
    for name, weights in ((one, ONE), (two, TWO)):
        assert is_same(taken(f"{file}:{name}")[0], weights)
        if case == "prefixes":
            assert is_same(taken(f"{file}:{name.removeprefix('state_dict.')}")[0], weights)
    names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in (one, two)))
    with pytest.raises(ConfigError, match=f":pupil has no entry 'pupil', but {names}$"):
        taken(f"{file}:pupil")
    torch.save(ONE, file)
    with pytest.raises(ConfigError, match=r"has no entry 'pupil': it is one state dict$"):
        taken(f"{file}:pupil")


class Shell:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir")]
)
def test_nothing_in_a_pickle_is_executed(
    function: Callable[..., object], name: str, zipped: bool, tmp_path: Path
) -> None:
    marker, file = tmp_path / "marker", tmp_path / "w.pth.tar"
    calls = {"eval": f"open({str(marker)!r}, 'w')", "posix.system": f"touch {marker}"}
    content = {"state_dict": ONE, "args": Shell(function, calls.get(name, str(marker)))}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ConfigError, match=rf"w\.pth\.tar needs {name}, and nothing but tensors"
    ) as e:
        taken(file)
    assert not marker.exists() and "\n" not in str(e.value)
