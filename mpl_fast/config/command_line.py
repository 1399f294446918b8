"""Command line and YAML file to one checked `RunConfig`; imports no torch, so --help is quick."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

from mpl_fast.config.algorithms import RECIPES, FinetuneConfig
from mpl_fast.config.aliases import OPTION_NAMES, OPTION_VALUES, changes, renamed
from mpl_fast.config.cards import CARDS
from mpl_fast.config.dry_run import DryRunConfig
from mpl_fast.config.fields import (
    OneOf,
    Option,
    all_options,
    options,
    problems,
    replaced,
    sections,
    texts,
)
from mpl_fast.config.run import RunConfig
from mpl_fast.config.values import convert, metavar, ranges, wanted
from mpl_fast.errors import ConfigError
from mpl_fast.untrusted import yaml_node

THEN_STEPS = 1000
USAGE = f"""torchrun --nproc-per-node=8 mpl_fast/train.py --config configs/NAME.yaml --data.root REC
--run-dir RUN

Trains one recipe. Options override the YAML file, which overrides the defaults shown here.
The --algorithm.* options are those of one recipe: --recipe uda --help lists those of uda.
The same command with the same --run-dir resumes. With --dry-run it only prints what it would need,
and --device may name a GPU that is not here: {", ".join(CARDS)}.
With --then finetune a second run follows in RUN/finetune, which fine-tunes the first one's network
on the labeled images. --then.KEY is an option of that run (--recipe finetune --help lists them);
without, it has {THEN_STEPS:,} steps and otherwise the data, model, batch and device of the first.
Words in option names are joined by - or _."""

FLAGS = {
    "help": "Print this text and exit.",
    "print_config": "Print the config as YAML and exit.",
    "dry_run": "Print memory, operations, time and data rate that the run would need, and exit.",
}
THEN = "then."
# What the second run of a command does not have from the first, besides its algorithm.
OF_THE_FIRST = {"run_dir", "steps", "epochs", "eval_every", "eval_epochs", "patience", "stop_at"}
OF_THE_FIRST |= {"model.pretrained"}
# What it cannot have of its own: with another run_dir of the first these are others.
FROM_THE_FIRST = ("run_dir", "device", "algorithm.start")
DRY_RUN = {option.key: option for option in options(DryRunConfig()) if option.key != "card"}
OF_A_CARD = {"network_gbps", "price_per_gpu_hour"}  # of no use without one
DEVICES = ("auto", "cuda", "cpu")
RECIPE = Option("recipe", Annotated[str, OneOf(RECIPES)], "mpl")
LENGTHS = (("steps", "epochs"), ("eval_every", "eval_epochs"))


class Given(NamedTuple):
    """A value as it was given."""

    text: str | list[str]
    where: str = ""  # ``FILE:LINE: ``, or nothing for the command line


def parse(argv: Sequence[str], *, for_training: bool = True) -> RunConfig:
    """The config of a run from its command line, of the first one if there are two. Raises
    `ConfigError` for anything wrong in it.

    Contradictions among algorithm options are ignored unless `for_training`.
    """
    return phases(argv, for_training=for_training)[0]


def phases(argv: Sequence[str], *, for_training: bool = True) -> list[RunConfig]:
    """The config of a run and, with ``--then finetune``, that of the one that follows."""
    typed = _renamed(_command_line(argv), "the command line")
    dry_run = _without_dry_run(typed)
    file = typed.pop("config", None)
    read = _renamed(yaml_file(str(file.text)), str(file.text)) if file else {}
    typed, then_typed = _without_then(typed)
    read, then_read = _without_then(read)
    recipe = str({**read, **typed}.get("recipe", Given(RECIPE.value)).text)
    if recipe not in RECIPES:
        raise ConfigError(f"recipe {recipe!r} does not exist{near(recipe, list(RECIPES))}")
    default = RunConfig(algorithm=RECIPES[recipe]())
    if "help" in typed:
        print(_help(default), end="")
        raise SystemExit(0)
    configs = [_config(default, typed, read)]
    if then := {**then_read, **then_typed}:
        _check_then(then)
        configs.append(_config(_second(configs[0]), then_typed, then_read, THEN))
    if "print_config" in typed:
        print(as_yaml(*configs), end="")
        raise SystemExit(0)
    unneeded = [] if for_training else ["algorithm."]
    if dry_run:
        unneeded += ["run_dir is missing", *(["data.root is missing"] if dry_run.records else [])]
    for config, prefix in zip(configs, ("", THEN), strict=False):
        for problem in problems(config):
            if not problem.startswith(tuple(unneeded)):
                raise ConfigError(prefix + problem)
    return configs


def _config(
    default: RunConfig, typed: Mapping[str, Given], read: Mapping[str, Given], prefix: str = ""
) -> RunConfig:
    """A config with what was typed, and read from a file, in place of defaults; their keys begin
    with `prefix`."""
    known = {
        f"{prefix}{option.key}": option._replace(key=f"{prefix}{option.key}")
        for option in (RECIPE, *all_options(default))
    }
    recipe, flags = default.recipe, () if prefix else FLAGS
    _check_names(typed, [*known, *flags], f"unknown option --{{}} of recipe {recipe}", "--")
    _check_names(read, list(known), f"unknown key {{}} of recipe {recipe}")
    values = {
        key.removeprefix(prefix): value_of(given, known[key])
        for key, given in {**read, **typed}.items()
        if key in known
    }
    return _lengths(replaced(default, values), [key.removeprefix(prefix) for key in typed])


def _without_then(given: Mapping[str, Given]) -> tuple[dict[str, Given], dict[str, Given]]:
    """The options of the first run, and those of the second, of which ``then`` is the recipe."""
    found = {f"{THEN}recipe" if key == "then" else key: value for key, value in given.items()}
    second = {key: value for key, value in found.items() if key.startswith(THEN)}
    return {key: value for key, value in found.items() if key not in second}, second


def _check_then(given: Mapping[str, Given]) -> None:
    """Raises `ConfigError` unless the second run is fine-tuning."""
    recipe = given.get(f"{THEN}recipe")
    if recipe is None:
        key, value = next(iter(given.items()))
        raise ConfigError(f"{value.where}{key} is for a second run: give --then finetune as well")
    if recipe.text != FinetuneConfig.recipe:
        raise ConfigError(f"{recipe.where}then must be finetune, not {recipe.text}")
    for key in (f"{THEN}{name}" for name in FROM_THE_FIRST):
        if key in given:
            raise ConfigError(f"{given[key].where}{key} cannot be given: the first run has it")


def _second(first: RunConfig) -> RunConfig:
    """Fine-tuning of a run in a folder inside its own."""
    run_dir = first.run_dir or "RUN"  # of a dry run
    inherited = {
        option.key: option.value
        for option in all_options(first)
        if option.key not in OF_THE_FIRST and not option.key.startswith("algorithm.")
    }
    default = RunConfig(
        run_dir=str(Path(run_dir) / FinetuneConfig.recipe),
        steps=THEN_STEPS,
        algorithm=FinetuneConfig(start=run_dir),
    )
    config: RunConfig = replaced(default, inherited)
    return config


def dry_run_of(argv: Sequence[str]) -> DryRunConfig | None:
    """The dry run that arguments request which `parse` has accepted; None: training."""
    return _without_dry_run(_command_line(argv))


def _without_dry_run(typed: dict[str, Given]) -> DryRunConfig | None:
    """Takes the options of a dry run out of those that were typed, where a GPU becomes cuda."""
    card = str(typed["device"].text).lower() if "device" in typed else ""
    theirs = {key: typed.pop(key) for key in DRY_RUN if key in typed}
    if card in CARDS:
        typed["device"] = Given("cuda")
    if "dry_run" not in typed:
        for option in [*theirs, *([f"device {card}"] if card in CARDS else [])]:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} is for a dry run: give --dry-run as well")
        return None
    if card and card not in (*DEVICES, *CARDS):
        names = ", ".join([*DEVICES, *list(CARDS)[:-1]]) + f" or {list(CARDS)[-1]}"
        raise ConfigError(f"device must be {names}, not {card}")
    values = {key: value_of(given, DRY_RUN[key]) for key, given in theirs.items()}
    config: DryRunConfig = replaced(DryRunConfig(card=card if card in CARDS else ""), values)
    for problem in problems(config):
        raise ConfigError(problem)
    if "records" in theirs and "data.root" in typed:
        raise ConfigError("--records is in place of --data.root: give one of them")
    for key in OF_A_CARD & theirs.keys() if not config.card else ():
        name = key.replace("_", "-")
        raise ConfigError(f"--{name} needs a GPU: give --device as {', '.join(CARDS)}")
    return config


def as_yaml(config: RunConfig, then: RunConfig | None = None) -> str:
    """Text that `phases` reads back to equal configs."""
    tree = {"recipe": config.recipe, **dataclasses.asdict(config)}
    if then:
        second = {"recipe": then.recipe, **dataclasses.asdict(then)}
        del second["run_dir"], second["device"], second["algorithm"]["start"]  # FROM_THE_FIRST
        tree["then"] = second
    return yaml.dump(_lists(tree), Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.2 reads as numbers: to PyYAML, of YAML 1.1, 2e5 is a text."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+|\d+\.\d*|\.\d+)([eE][-+]?\d+)?|0o[0-7]+"),
    list("-+.0123456789"),
)


def _command_line(argv: Sequence[str]) -> dict[str, Given]:
    """Options by name, with _ for -; the last one counts."""
    found: dict[str, Given] = {}
    left = iter(argv)
    for argument in left:
        name, equals, value = ("--help" if argument == "-h" else argument).partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--"):
            raise ConfigError(f"unknown option {argument}: options begin with --")
        if key in FLAGS and equals:
            raise ConfigError(f"--{key} takes no value")
        if key not in FLAGS and not equals:
            value = next(left, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name} needs a value")
        if key == "config" and key in found:
            raise ConfigError("--config is given twice: put all keys into one file")
        found[key] = Given(value)
    return found


def yaml_file(file: str, option: str = "--config") -> dict[str, Given]:
    """The values of a YAML file, named by `option` in messages, by dotted key."""
    try:
        tree = yaml_node(Path(file))
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if tree is None:
        raise ConfigError(f"{file} is empty")
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{file} must hold keys and values, such as 'steps: 1000'")
    values: dict[str, Given] = {}
    for key, given in _yaml_values(tree, file):
        if key in values:
            raise ConfigError(f"{given.where}{key} is given here for the second time")
        values[key] = given
    return values


def _yaml_values(
    tree: yaml.MappingNode, file: str, prefix: str = ""
) -> Iterator[tuple[str, Given]]:
    seen = set()
    for name, node in tree.value:
        key, where = f"{prefix}{name.value}", f"{file}:{name.start_mark.line + 1}: "
        if key in seen:
            raise ConfigError(f"{where}{key} is given here for the second time")
        seen.add(key)
        if isinstance(node, yaml.MappingNode) and node.value:
            yield from _yaml_values(node, file, f"{key}.")
        elif node.tag.endswith(":null") or isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{where}{key} has no value")
        elif isinstance(node, yaml.SequenceNode):
            yield key, Given([str(item.value) for item in node.value], where)
        else:
            yield key, Given(node.value, where)


def _renamed(options: dict[str, Given], source: str) -> dict[str, Given]:
    """The options under their present names, with a warning if there are old ones among them."""
    for old in OPTION_NAMES.keys() & options.keys():
        if (new := OPTION_NAMES[old]) in options:
            raise ConfigError(f"{options[old].where}{old} and {new} are one option: give {new}")
    old_names = changes({name: given.text for name, given in options.items()})
    if old_names and os.environ.get("RANK", "0") == "0":
        print(f"warning: {source} uses old option names: {', '.join(old_names)}", file=sys.stderr)
    return {
        key: Given(OPTION_VALUES.get(key, {}).get(str(given.text), given.text), given.where)
        for key, given in renamed(options, OPTION_NAMES).items()
    }


def _check_names(
    options: Mapping[str, Given], known: Sequence[str], message: str, dashes: str = ""
) -> None:
    for key, given in options.items():
        if key not in known:
            inner = [f"{dashes}{name}" for name in known if name.startswith(f"{key}.")]
            hint = f", which is a section: give {inner[0]}" if inner else near(key, known, dashes)
            raise ConfigError(f"{given.where}{message.format(key)}{hint}")


def value_of(given: Given, option: Option) -> Any:
    """The value of an option. Raises `ConfigError` if what was given is none of its type."""
    try:
        return convert(given.text, option.kind)
    except (ValueError, KeyError):
        shown = given.text if isinstance(given.text, str) else f"[{', '.join(given.text)}]"
        raise ConfigError(
            f"{given.where}{option.key} must be {wanted(option.kind)}, not {shown}"
        ) from None


def _lengths(config: RunConfig, typed: Sequence[str]) -> RunConfig:
    """A length in steps on the command line overrides one in epochs in the file."""
    for steps, epochs in LENGTHS:
        if steps in typed and epochs in typed:
            raise ConfigError(f"--{steps} and --{epochs} set the same length: give one")
        if steps in typed:
            config = replaced(config, {epochs: 0.0})
    return config


def near(word: str, known: Sequence[str], dashes: str = "") -> str:
    """``; did you mean X?``, or nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not found:  # a right name in a wrong section is a common slip
        leaf = word.rpartition(".")[2]
        found = [key for key in known if key.rpartition(".")[2] == leaf][:1]
    if not found:
        return ""
    name = found[0].replace("_", "-") if dashes else found[0]
    return f"; did you mean {dashes}{name}?"


def _lists(value: Any) -> Any:
    """Tuples become lists, since plain YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _help(config: RunConfig) -> str:
    # Only for its help: it parses nothing.
    parser = argparse.ArgumentParser(
        prog="train.py", usage=USAGE, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below.")
    for flag, text in FLAGS.items():
        names = ("-h", "--help") if flag == "help" else (f"--{flag}",)
        parser.add_argument(*names, action="store_true", help=text)
    then = "Recipe of a second run, which follows in RUN/finetune (default: none)."
    parser.add_argument("--then", metavar=f"{{{FinetuneConfig.recipe}}}", help=then)
    for prefix, section in [*sections(config), ("", DryRunConfig())]:
        title = str(type(section).__doc__).partition("\n")[0].rstrip(".")
        group = parser.add_argument_group(f"{prefix.rstrip('.')}: {title}" if prefix else title)
        explained = {"recipe": str(RunConfig.recipe.__doc__), **texts(type(section))}
        known = DRY_RUN.values() if section == DryRunConfig() else options(section, prefix)
        for option in (*((RECIPE,) if section is config else ()), *known):
            facts = [*ranges(option.kind), f"default: {as_typed(option.value) or 'empty'}"]
            text = f"{explained[option.key.removeprefix(prefix)]} ({'; '.join(facts)})"
            text = text.replace("%", "%%")
            group.add_argument(f"--{option.key}", metavar=metavar(option.kind), help=text)
    return parser.format_help()


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Values of dotted keys as a command line."""
    return [part for key, value in values.items() for part in (f"--{key}", as_typed(value))]


def as_typed(value: Any) -> str:
    """A value as it would be typed."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
