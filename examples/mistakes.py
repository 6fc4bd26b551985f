"""A mistake in a command is told in one line: what was found, what was expected, and how to mend it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a wrong command line, where argparse prints its usage and exits, once for each rank."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help lists the options.")


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """A wrong option, model, file or YAML ends the script with one line, and exit code 1.

    `accelerate launch --debug` shows the traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("ACCELERATE_DEBUG_MODE") == "true":
            raise
        line = f"error: {' '.join(str(error).split())}"
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(5)  # rank 0 has most likely the same error: then the launcher ends this rank before it tells it
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torch's launcher ends its own report with the line
            with open(file, "w") as report:
                json.dump({"message": line, "timestamp": int(time.time())}, report)
        sys.exit(line)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argparse option that takes a whole number, `least` or more."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}, expected {least} or more")
        return int(text)

    return whole_number


def above_zero(text: str) -> float:
    """The type of an argparse option that takes a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0")
    return float(text)
