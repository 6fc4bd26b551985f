"""python -m accel_moe.families: every Mixture-of-Experts family of the installed transformers, and its support here.

    python -m accel_moe.families                     the table, for reading
    python -m accel_moe.families --markdown          the same as a Markdown table
    python -m accel_moe.families --tsv               the same as tab-separated values
    python -m accel_moe.families qwen3_moe gpt_oss   only these
    python -m accel_moe.families --check             whether the installed versions fit; exit status 1 if not

Reads the installed transformers, without GPU or network. accel_moe/catalogue.py makes the table, accel_moe/check.py
the check.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from accel_moe import catalogue, check

COLUMNS = ("family", "status", "maths", "kernel", "Hub keys", "tested: ep / consolidate / load", "note")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m accel_moe.families", description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help="only these families")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a Markdown table")
    form.add_argument("--tsv", action="store_true", help="tab-separated values")
    form.add_argument("--check", action="store_true", help="say whether the installed versions fit; try these families")
    options = parser.parse_args(arguments)
    known = {source.name for source in catalogue.sources()}
    if unknown := sorted(set(options.family) - known):
        parser.error(f"no such family of the installed transformers: {', '.join(unknown)}")
    if options.check:
        return check.report(options.family or check.PROBED)
    rows = [_cells(family) for family in catalogue.families(options.family or None)]
    if options.tsv:
        text = "\n".join("\t".join(row) for row in [COLUMNS, *rows])
    elif options.markdown:
        rule = ["---"] * len(COLUMNS)
        text = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [COLUMNS, rule, *rows]
        )
    else:
        text = _aligned([COLUMNS, *rows])
    print(text)
    if not options.tsv:
        print(f"\n{_summary(rows)}")
    return 0


def _cells(family: catalogue.Family) -> list[str]:
    tested = " / ".join(family.tested)
    return [family.name, family.status, family.maths, family.kernel, family.hub_keys, tested, family.note]


def _aligned(rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    return "\n".join("  ".join([cell.ljust(w) for cell, w in zip(row, widths)] + [row[-1]]).rstrip() for row in rows)


def _summary(rows: list[list[str]]) -> str:
    import transformers

    refused = sum(row[1] == "refused" for row in rows)
    ours = sum(row[3] == "scattermoe" for row in rows)
    return (
        f"transformers {transformers.__version__}: {len(rows)} families with experts, {len(rows) - refused} supported "
        f"({ours} with moe_kernel scattermoe), {refused} refused."
    )


if __name__ == "__main__":
    # the process is ours; transformers' warnings about a hundred tiny models would bury the table
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.exit(main())
