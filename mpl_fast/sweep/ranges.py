"""The ranges of a sweep: a YAML file over keys of the config.

`algorithm.student.lr: {low: 0.01, high: 0.3, log: true}` or `data.num_ops: [1, 2, 3]`.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, get_args, get_origin

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json
from optuna.distributions import FloatDistribution as Floats
from optuna.distributions import IntDistribution as Ints

from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import OPTION_NAMES
from mpl_fast.config.command_line import Given, as_typed, near, value_of, yaml_file
from mpl_fast.config.fields import Option, all_options, out_of_range
from mpl_fast.errors import ConfigError

Params = Mapping[str, Any]
BOUNDS = ("low", "high", "log", "step")
OWN = {
    "run_dir": "--out",
    "data.root": "--data.root, which all trials share",
    "stop_at": "the sweep itself",
    "recipe": "--config: make a sweep for each recipe",
}
FORMS = "a list of choices, or {low: A, high: B} and log: true or step: S"


def read_ranges(file: str, config: RunConfig) -> dict[str, BaseDistribution]:
    """The distribution of each searched key. Raises `ConfigError`, which names file and key, for
    what `config` has no such option for, or whose values are not in the option's own range."""
    known = {option.key: option for option in all_options(config)}
    found: dict[str, dict[str, Given]] = {}
    for key, given in yaml_file(file, "--ranges").items():
        base, _, bound = key.rpartition(".")
        own, base = (OPTION_NAMES.get(name, name) for name in (key, base))
        if reason := OWN.get(own, OWN.get(base)):
            raise ConfigError(f"{given.where}{key} cannot be searched: it is set by {reason}")
        if own in known:
            found[own] = {"choices": given}
        elif base in known and bound in BOUNDS:
            found.setdefault(base, {})[bound] = given
        elif base in known:
            raise ConfigError(f"{given.where}{base} takes {FORMS}, not {bound}")
        else:
            hint = near(key, list(known))
            raise ConfigError(f"{given.where}unknown key {key} of recipe {config.recipe}{hint}")
    return {key: _distribution(known[key], parts) for key, parts in found.items()}


def draw(trial: optuna.Trial, ranges: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The values of a trial: those that it has already, and new ones for the other keys."""
    drawn: dict[str, Any] = {}
    for key, kind in ranges.items():
        if isinstance(kind, Ints):
            drawn[key] = trial.suggest_int(key, kind.low, kind.high, step=kind.step, log=kind.log)
        elif isinstance(kind, Floats):
            drawn[key] = trial.suggest_float(key, kind.low, kind.high, step=kind.step, log=kind.log)
        elif isinstance(kind, CategoricalDistribution):
            drawn[key] = trial.suggest_categorical(key, kind.choices)
    return drawn


def shown(params: Params) -> str:
    """The values for a reader, with four digits."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {as_typed(value)}"
        for key, value in params.items()
    )


def ranges_as_json(ranges: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """To compare them with those of another start."""
    return {key: json.loads(distribution_to_json(kind)) for key, kind in ranges.items()}


def own_values(config: RunConfig, ranges: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """The config's own values of the searched keys, without those that cannot be drawn."""
    values = {option.key: option.value for option in all_options(config)}
    own = {key: values[key] for key in ranges}
    own |= {key: as_typed(value) for key, value in own.items() if isinstance(value, tuple)}
    return {key: value for key, value in own.items() if _holds(ranges[key], value)}


def _holds(kind: BaseDistribution, value: Any) -> bool:
    if isinstance(kind, CategoricalDistribution):
        return value in kind.choices
    assert isinstance(kind, Ints | Floats)
    steps = (value - kind.low) / kind.step if kind.step else 0.0
    return bool(kind.low <= value <= kind.high) and abs(steps - round(steps)) < 1e-6


def _distribution(option: Option, parts: dict[str, Given]) -> BaseDistribution:
    if "choices" in parts:
        if len(parts) > 1:
            raise ConfigError(f"{parts['choices'].where}{option.key} has choices and bounds")
        return _choices(option, parts["choices"])
    first = next(iter(parts.values()))
    where = f"{first.where}{option.key}"
    plain = get_args(option.kind)[0] if get_origin(option.kind) is Annotated else option.kind
    if plain not in (int, float):
        raise ConfigError(f"{where} is no number: give a list of choices")
    if missing := {"low", "high"} - parts.keys():
        raise ConfigError(f"{where} takes {FORMS}: {sorted(missing)[0]} is missing")
    low, high = (_checked(parts[name], option) for name in ("low", "high"))
    log = "log" in parts and value_of(parts["log"], Option(f"{option.key}.log", bool, False))
    step = value_of(parts["step"], Option(f"{option.key}.step", plain, 0)) if "step" in parts else 0
    if low > high:
        raise ConfigError(f"{where}: low {low} is above high {high}")
    if log and low <= 0:
        raise ConfigError(f"{where}: with log: true, low must be above 0, not {low}")
    if log and step:
        raise ConfigError(f"{where}: step and log: true exclude each other")
    if "step" in parts and step <= 0:
        raise ConfigError(f"{where}: step must be above 0, not {step}")
    if step:  # the last value that steps reach
        a, b, each = (Decimal(str(number)) for number in (low, high, step))
        high = type(high)(a + (b - a) // each * each)
    if plain is int:
        return Ints(low, high, log=log, step=step or 1)
    return Floats(low, high, log=log, step=step or None)


def _choices(option: Option, given: Given) -> BaseDistribution:
    if isinstance(given.text, str):
        raise ConfigError(f"{given.where}{option.key} takes {FORMS}, not {given.text}")
    if not given.text:
        raise ConfigError(f"{given.where}{option.key} has no choices")
    values = [_checked(Given(text, given.where), option) for text in given.text]
    # A list, such as data.mean, is stored as its text.
    values = [as_typed(value) if isinstance(value, tuple) else value for value in values]
    if len(set(values)) < len(values):
        raise ConfigError(f"{given.where}{option.key} has a choice twice")
    return CategoricalDistribution(values)


def _checked(given: Given, option: Option) -> Any:
    """A value of the option, in its range."""
    value = value_of(given, option)
    for problem in out_of_range(option._replace(value=value)):
        raise ConfigError(f"{given.where}{problem}")
    return value
