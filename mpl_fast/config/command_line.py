"""From a command line and a YAML file to one checked `RunConfig`; torch-free, so that --help is
instant."""

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from mpl_fast.config import RECIPES, AlgorithmConfig, RunConfig, problems
from mpl_fast.errors import ConfigError
from mpl_fast.errors import fail as fail

USAGE = """torchrun --nproc-per-node=8 mpl_fast/train.py --config configs/NAME.yaml --data.root REC
--run-dir RUN

Trains one recipe. Options override the YAML file, which overrides the defaults shown here.
The --algorithm.* options are those of one recipe: see them by --recipe uda --help.
The same command with the same --run-dir resumes; with --dry-run it only tells what it would take.
Words in option names join with - or _ alike."""

LENGTHS = ("steps", "epochs", "eval_every", "eval_epochs")
DRY_RUN = "dry_run"
BARE = ("config", "help", "print_config", DRY_RUN)  # the parser's own, not the config's


def parse(argv: Sequence[str], *, for_training: bool = True) -> RunConfig:
    """The run that the arguments ask for. Raises `ConfigError` for anything wrong with them.

    Who does not train has no need of an algorithm whose values go together.
    """
    arguments = _config_first([_underscored(a) for a in argv])
    file = _option(arguments, "config")
    tree = _read_yaml(file) if file else None
    values: dict[str, Any] = _plain(tree) if tree else {}
    recipe = _option(arguments, "recipe") or str(values.get("recipe", "mpl"))
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} does not exist{_near(recipe, list(RECIPES))}")
    known = list(_keys(RunConfig, RECIPES[recipe]))
    lines = _check_yaml_keys(file or "", tree, known, recipe) if tree else {}
    _check_options(arguments, known, recipe)
    config = _lengths(_parse_types(arguments, recipe, lines), arguments)
    for problem in problems(config):
        if for_training or not problem.startswith("algorithm."):
            raise ConfigError(problem)
    return config


def wants_dry_run(argv: Sequence[str]) -> bool:
    """Whether the arguments, which `parse` has found right, ask for a dry run only."""
    return f"--{DRY_RUN}" in map(_underscored, argv)


def _lengths(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """A length in steps on the command line wins over one in epochs from the file."""
    given = {key for key in LENGTHS if _option(arguments, key) is not None}
    for steps, epochs in (LENGTHS[:2], LENGTHS[2:]):
        if {steps, epochs} <= given:
            raise ConfigError(f"--{steps} and --{epochs} say the same thing twice: give one")
    if "steps" in given:
        config = dataclasses.replace(config, epochs=0.0)
    return dataclasses.replace(config, eval_epochs=0.0) if "eval_every" in given else config


def as_yaml(config: RunConfig) -> str:
    """Text that `parse` reads back to an equal config."""
    return yaml.safe_dump(_lists(dataclasses.asdict(config)), sort_keys=False)


def _parse_types(arguments: list[str], recipe: str, lines: dict[str, str]) -> RunConfig:
    """`lines` says where in the YAML file a key stands."""
    parser = _parser(RECIPES[recipe])
    given = [a for a in arguments if a != f"--{DRY_RUN}"]  # which --print_config would print
    try:
        found = parser.instantiate(parser.parse_args(given)).as_dict()
    except SystemExit:
        raise
    except (
        Exception
    ) as error:  # jsonargparse raises many kinds; each carries the reason in its text
        raise ConfigError(_reworded(" ".join(str(error).split()), arguments, lines)) from None
    for name in BARE:
        found.pop(name, None)
    return RunConfig(**found)


TYPES = {"<class 'int'>": "a whole number", "<class 'float'>": "a number"}
TYPES |= {"<class 'tuple'>": "a list such as [1,2,3]"}
TYPES |= {"<class 'bool'>": "true or false", "<class 'str'>": "a text"}


def _reworded(message: str, arguments: Sequence[str], lines: dict[str, str]) -> str:
    """jsonargparse's word on a wrong type, in the words of this program."""
    key = re.search(r'(?:Parser key|Problem with given value for|key) "?([\w.]+)"?:', message)
    told = re.search(r"Expected an? (.+?)\. Got value: (.*)$", message)
    if not (key and told):
        return message
    names = re.findall(r"'([^']+)'", told[1]) if "Literal" in told[1] else []
    wanted = ", ".join(names[:-1]) + f" or {names[-1]}" if names else TYPES.get(told[1], told[1])
    given = any(a.partition("=")[0] == f"--{key[1]}" for a in arguments)
    where = "" if given else lines.get(key[1], "")
    return f"{where}{key[1]} must be {wanted}, not {told[2]}"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(" ".join(message.split()))


def _parser(algorithm: type[AlgorithmConfig]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog="train.py", usage=USAGE)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_argument(
        f"--{DRY_RUN}",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print memory, operations, time and data rate that the run would need, and exit.",
    )
    parser.add_class_arguments(RunConfig, skip={"algorithm"})
    parser.add_class_arguments(algorithm, "algorithm")
    return parser


def _underscored(argument: str) -> str:
    """``--run-dir=a-b`` becomes ``--run_dir=a-b``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _config_first(arguments: list[str]) -> list[str]:
    """The parser lets a file win over options that stand before it; here they win anywhere."""
    first, others, left = list[str](), list[str](), iter(arguments)
    for argument in left:
        if argument == "--config":
            first += [argument, *([value] if (value := next(left, None)) is not None else [])]
        else:
            (first if argument.startswith("--config=") else others).append(argument)
    return first + others


def _option(arguments: Sequence[str], name: str) -> str | None:
    """The last value given to an option that must be known before the parser can be built."""
    value = None
    for i, argument in enumerate(arguments):
        if argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
        elif argument == f"--{name}":
            if i + 1 == len(arguments):
                raise ConfigError(f"--{name} needs a value")
            value = arguments[i + 1]
    return value


def _keys(config: type, algorithm: type) -> Iterator[str]:
    """Every dotted key, sections included."""
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        yield item.name
        inner = algorithm if item.name == "algorithm" else hints[item.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from (f"{item.name}.{key}" for key in _keys(inner, algorithm))


def _check_options(arguments: Sequence[str], known: Sequence[str], recipe: str) -> None:
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name[2:] not in (*known, *BARE):
            hint = _near(name[2:], known, "--")
            raise ConfigError(f"unknown option {name} of recipe {recipe}{hint}")
        negative = argument[1:2].isdigit()
        if argument.startswith("-") and not (name.startswith("--") or negative or argument == "-h"):
            raise ConfigError(f"unknown option {argument}: options begin with --")


def _check_yaml_keys(
    file: str, tree: yaml.MappingNode, known: Sequence[str], recipe: str
) -> dict[str, str]:
    """Where each key stands, as ``FILE:LINE: ``."""
    seen: dict[str, str] = {}
    for key, line, empty in _yaml_keys(tree):
        if key in seen:
            raise ConfigError(f"{file}:{line}: {key} stands here for the second time")
        seen[key] = f"{file}:{line}: "
        if key not in known:
            hint = _near(key, known)
            raise ConfigError(f"{file}:{line}: unknown key {key} of recipe {recipe}{hint}")
        if empty:
            raise ConfigError(f"{file}:{line}: {key} has no value")
    return seen


def _yaml_keys(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int, bool]]:
    """Dotted key, line, and whether nothing stands behind the colon."""
    for key, value in node.value:
        empty = value.tag.endswith(":null")
        yield prefix + str(key.value), key.start_mark.line + 1, empty
        if isinstance(value, yaml.MappingNode):
            yield from _yaml_keys(value, f"{prefix}{key.value}.")


def _read_yaml(file: str) -> yaml.MappingNode:
    try:
        tree = yaml.compose(Path(file).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{file} is empty")
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{file} must hold keys and values, such as 'steps: 1000'")
    return tree


def _plain(node: yaml.MappingNode) -> dict[str, Any]:
    """Only the scalars of the top level: the recipe's name is all that is needed before parsing."""
    return {k.value: v.value for k, v in node.value if isinstance(v, yaml.ScalarNode)}


def _near(word: str, known: Sequence[str], dashes: str = "") -> str:
    """`; did you mean X?`, or nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:  # a right leaf in a wrong section is a common slip
        leaf = word.rpartition(".")[2]
        found = [k for k in known if k.rpartition(".")[2] == leaf][:1]
    if not found:
        return ""
    name = found[0].replace("_", "-") if dashes else found[0]
    return f"; did you mean {dashes}{name}?"


def _lists(value: Any) -> Any:
    """Tuples become lists, which is all that plain YAML knows."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
