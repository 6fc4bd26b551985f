"""`python -m accel_moe.families`: the table says what `prepare()` does, for every family there is."""

from __future__ import annotations

import contextlib
import csv
import io

import pytest
import transformers

from accel_moe import catalogue, families
from accel_moe.experts import recognise
from tests.families import tiny_families


def rows_of(*arguments: str) -> list[dict[str, str]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert families.main(["--tsv", *arguments]) == 0
    return list(csv.DictReader(io.StringIO(out.getvalue()), delimiter="\t"))


@pytest.fixture(scope="module")
def table():
    return rows_of()


def test_every_family_with_experts_has_one_row(table):
    assert [row["family"] for row in table] == [source.name for source in catalogue.sources()]
    assert {row["family"] for row in table if row["status"] != "refused"} == {s.name for s in tiny_families.families()}


def test_every_row_has_a_reason_or_a_kernel(table):
    for row in table:
        assert row["note"] if row["status"] == "refused" else row["kernel"] and row["maths"] and row["Hub keys"]
        assert (row["kernel"] == "grouped_mm") <= bool(row["note"]), row


def test_the_claims_about_tests_are_those_tests_families(table):
    from tests.families import test_over_ranks, test_round_trip

    for row in table:
        if row["status"] == "refused":
            continue
        ep, consolidate, load = row["tested: ep / consolidate / load"].split(" / ")
        name = row["family"]
        assert (ep == "yes") == (name in test_over_ranks.DEFAULT)
        assert (consolidate == "yes") == (name in test_round_trip.DEFAULT)
        assert (ep == consolidate == "no") == (name in test_over_ranks.ONE_RANK_ONLY)
        assert load == "yes"  # tests/unit/test_load_families.py has all


@pytest.mark.parametrize(("family", "whose"), [("sarvam_moe", "Glm4MoeExperts"), ("sarvam_mla", "DeepseekV3Experts")])
def test_a_family_without_a_modeling_file_is_found_by_the_model_that_the_auto_classes_give_it(family, whose):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    (row,) = catalogue.families([family])
    assert (row.status, row.experts) == ("supported", (whose,))
    model = tiny_families.tiny(family).build()
    assert model.config.model_type == family
    assert {type(layer).__name__ for layer in recognise.find_experts(model).values()} == {whose}


def test_a_family_whose_modeling_file_cannot_be_imported_is_a_row_with_the_reason(monkeypatch):
    def no_module(*_):
        raise ImportError("it needs a package that is not here")

    monkeypatch.setattr(catalogue, "build_experts", no_module)
    (row,) = catalogue.families(["mixtral"])
    assert (row.status, row.note) == ("refused", "it needs a package that is not here")


def test_one_family_can_be_asked_for_and_an_unknown_one_is_an_error(capsys):
    assert [row["family"] for row in rows_of("gpt_oss")] == ["gpt_oss"]
    with pytest.raises(SystemExit) as stopped:
        families.main(["qwen33_moe"])
    assert stopped.value.code == 2
    assert "no such family of the installed transformers: qwen33_moe" in capsys.readouterr().err


def test_the_markdown_has_the_same_rows_and_counts_them(capsys):
    names = ["dbrx", "qwen3_moe"]
    assert families.main(["--markdown", *names]) == 0
    out = capsys.readouterr().out
    assert [line.split(" | ")[0].strip("| ") for line in out.splitlines()[2:4]] == names
    assert "2 families with experts, 1 supported" in out
