"""What the experiments' command lines have in common; torch-free, so that --help is instant."""

import argparse
from typing import NoReturn

from mpl_fast.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake on one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


class AtLeast:
    """Reads a whole number that has a lower bound."""

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = self.least - 1
        if value < self.least:
            message = f"must be a whole number of at least {self.least}, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value
