"""The sweep's rows are an artefact of the run: one TSV, at `--families-table PATH` or in pytest's temporary folder.

The option exists when pytest is given this folder: `pytest tests/families --slow --families-table families.tsv`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.sweep import Row, write_table


def pytest_addoption(parser):
    parser.addoption("--families-table", help="where the families sweep writes its table (TSV)")


@pytest.fixture(scope="session")
def families_table(request, tmp_path_factory):
    """A list to put rows in; written when the session ends."""
    rows: list[Row] = []
    yield rows
    given = request.config.getoption("--families-table", default=None)
    path = Path(given) if given else tmp_path_factory.mktemp("families") / "families.tsv"
    write_table(sorted(rows, key=lambda row: (row.family, row.level)), path)
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\nfamilies table: {len(rows)} rows in {path}")
