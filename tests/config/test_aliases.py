"""Old names map to present ones; no present name is an old one."""

import pytest

from mpl_fast.config import RECIPES, RunConfig
from mpl_fast.config.aliases import (
    CHECKPOINT_KEYS,
    METRIC_NAMES,
    OPTION_NAMES,
    OPTION_VALUES,
    changes,
    current_options,
    renamed,
)
from mpl_fast.config.fields import all_options


def test_options_are_read_under_their_present_names_and_values() -> None:
    old = {"gradients": "flat", "algorithm.teacher.clip": 3.0, "data.weak": "cifar", "steps": 4}
    new = {"grad_sync": "allreduce", "algorithm.teacher.max_grad_norm": 3.0}
    new |= {"data.crop": "pad_crop", "steps": 4}
    assert list(current_options(old).items()) == list(new.items())
    assert current_options(new) == new
    assert renamed({"h": 1.0, "step": 2.0}, METRIC_NAMES) == {"feedback": 1.0, "step": 2.0}


def test_each_change_is_named_once() -> None:
    old = {"algorithm.teacher.wait": "1", "algorithm.student.wait": "2", "data.weak": "cifar"}
    phrases = ["wait is now delay_steps", "weak is now crop", "crop cifar is now pad_crop"]
    assert changes(old) == phrases
    assert changes(current_options(old)) == []


@pytest.mark.parametrize(
    "names", [OPTION_NAMES, CHECKPOINT_KEYS, METRIC_NAMES, *OPTION_VALUES.values()]
)
def test_no_name_is_both_old_and_present(names: dict[str, str]) -> None:
    assert not names.keys() & set(names.values())


def test_present_names_exist_and_old_ones_do_not() -> None:
    configs = [RunConfig(algorithm=kind()) for kind in RECIPES.values()]
    keys = {option.key for config in configs for option in all_options(config)}
    assert not keys & OPTION_NAMES.keys()
    assert {*OPTION_NAMES.values(), *OPTION_VALUES} <= keys
