"""`python -m accel_moe.doctor [MODEL] [--config_file YAML]`: is this machine fit, and is this model trained right here?

    python -m accel_moe.doctor                                                    the machine alone
    python -m accel_moe.doctor Qwen/Qwen3-30B-A3B --config_file my_accelerate.yaml
    python -m accel_moe.doctor path/to/model --config_file my_accelerate.yaml --output /scratch/runs

Every line has a tick or a cross; a cross says how to mend it. The machine takes less than a minute, the model less than
three. No weights are read: the model's config is cut to two small layers (docs/doctor.md).

Exit codes: 0 no cross; 1 a line has a cross; 2 wrong usage, or a model or a file that cannot be read.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

EXIT_FAILED, EXIT_USAGE = 1, 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accel_moe.doctor", description="Check this machine, and a model's training on it."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder with a config.json, or a Hub id")
    parser.add_argument("--config_file", metavar="YAML", help="the file that `accelerate launch` gets")
    parser.add_argument(
        "--output", type=Path, default=Path("."), metavar="FOLDER", help="where checkpoints go (default: here)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Usage errors exit with 2, as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        failures = diagnose(args.model, args.config_file, args.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE
    print(f"Crosses: {failures}. Each says how to mend it." if failures else "All is well.")
    return EXIT_FAILED if failures else 0


def diagnose(name: str | None, config_file: str | None, output: Path) -> int:
    """Prints the table. Returns the number of failures.

    Raises:
        ValueError: the model or the file cannot be read, or the model has no experts.
    """
    import torch

    from accel_moe.diagnosis import machine, model, settings
    from accel_moe.diagnosis.report import print_lines, skipped

    gpus = torch.cuda.device_count()
    found, in_force = settings.read(config_file, min(gpus, settings.MOST_RANKS) if gpus > 1 else 2)
    of_user = model.read(name) if name is not None else None
    failures = print_lines("settings", found)
    config, checkpoint_bytes = (of_user.config, of_user.checkpoint_bytes) if of_user else (None, 0)
    failures += print_lines("machine", machine.lines(config, output, checkpoint_bytes))
    if of_user is None:
        lines = iter([skipped("model", "none was named: only the machine was checked")])
    elif in_force is None:
        lines = iter([skipped("model", "not tried before the settings are mended")])
    else:
        lines = model.lines(of_user, in_force)
    return failures + print_lines("model", lines)


if __name__ == "__main__":
    # the process is ours: warnings of the libraries would bury the table
    warnings.filterwarnings("ignore")
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    sys.exit(main())
