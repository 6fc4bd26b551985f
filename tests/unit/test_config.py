"""What resolve() answers, and what it refuses: no launcher, no ranks, no model."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from accel_moe import config
from accel_moe.config import (
    MoEConfig,
    config_mismatch,
    missing_launcher_warning,
    option_names,
    options_table,
    resolve,
)
from accel_moe.launcher import LauncherYaml

REPOSITORY = Path(__file__).resolve().parents[2]
NO_LAUNCHER = LauncherYaml("no_launcher")


def yaml_with(path="/x/ep2.yaml", **sections):
    return LauncherYaml("found", path=path, content={"distributed_type": "FSDP", **sections})


def parallelism(**keys):
    return yaml_with(parallelism_config={"parallelism_config_dp_shard_size": 8, **keys})


def refusal(options=None, environ=None, yaml=NO_LAUNCHER):
    with pytest.raises(ValueError) as raised:
        resolve(options, environ=environ or {}, yaml=yaml)
    return str(raised.value)


# ---- Order and sources


def test_with_nothing_given_every_option_is_the_default_and_says_so():
    resolved = resolve(environ={}, yaml=NO_LAUNCHER)
    assert resolved.config == MoEConfig(moe_ep_degree=1, moe_kernel="auto")
    assert resolved.sources == dict.fromkeys(option_names(), "default")


def test_the_yaml_beats_the_default_and_the_source_names_file_and_key():
    resolved = resolve(environ={}, yaml=parallelism(moe_ep_degree=4))
    assert resolved.config.moe_ep_degree == 4
    assert resolved.sources["moe_ep_degree"] == "/x/ep2.yaml (parallelism_config.moe_ep_degree)"


def test_the_environment_beats_the_yaml():
    resolved = resolve(environ={"ACCEL_MOE_EP_DEGREE": "2"}, yaml=parallelism(moe_ep_degree=4))
    assert resolved.config.moe_ep_degree == 2
    assert resolved.sources["moe_ep_degree"] == "ACCEL_MOE_EP_DEGREE in the environment"


def test_the_argument_beats_the_environment():
    environ = {"ACCEL_MOE_EP_DEGREE": "2"}
    resolved = resolve({"moe_ep_degree": 8}, environ=environ, yaml=parallelism(moe_ep_degree=4))
    assert resolved.config.moe_ep_degree == 8
    assert resolved.sources["moe_ep_degree"] == "argument to prepare()"


def test_each_option_takes_its_own_highest_source():
    environ = {"ACCEL_MOE_KERNEL": "eager"}
    resolved = resolve(environ=environ, yaml=parallelism(moe_ep_degree=4, moe_kernel="grouped_mm"))
    assert resolved.config == MoEConfig(moe_ep_degree=4, moe_kernel="eager")


def test_a_yaml_without_our_keys_or_without_parallelism_config_leaves_the_defaults():
    for yaml in (parallelism(), yaml_with(), yaml_with(parallelism_config=None), LauncherYaml("no_file")):
        assert resolve(environ={}, yaml=yaml).config == MoEConfig()


def test_describe_gives_each_value_with_its_source_in_one_line():
    line = resolve({"moe_kernel": "eager"}, environ={}, yaml=parallelism(moe_ep_degree=4)).describe()
    assert line == (
        "accel_moe: moe_ep_degree=4 (/x/ep2.yaml (parallelism_config.moe_ep_degree)), "
        "moe_kernel='eager' (argument to prepare()), moe_dispatcher='auto' (default), "
        "moe_dispatch_chunk_tokens=0 (default), moe_recompute_up_projection=False (default), "
        "moe_quantize_experts='none' (default), moe_keep_exchanged=True (default), moe_async_save=False (default), "
        "moe_verify='checksums' (default)"
    )


def test_resolve_asks_the_launcher_when_no_yaml_is_handed_to_it(monkeypatch):
    monkeypatch.setattr(config, "find_launcher_yaml", lambda: parallelism(moe_ep_degree=4))
    assert resolve(environ={}).config.moe_ep_degree == 4


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig().moe_ep_degree = 2


# ---- Interpolation


def test_the_yaml_may_refer_to_the_environment(monkeypatch):
    monkeypatch.setenv("EP_OF_THIS_RUN", "4")
    assert resolve(environ={}, yaml=parallelism(moe_ep_degree="${oc.env:EP_OF_THIS_RUN}")).config.moe_ep_degree == 4


def test_an_interpolation_may_carry_a_default(monkeypatch):
    monkeypatch.delenv("EP_OF_THIS_RUN", raising=False)
    yaml = parallelism(moe_ep_degree="${oc.env:EP_OF_THIS_RUN,2}")
    assert resolve(environ={}, yaml=yaml).config.moe_ep_degree == 2


def test_an_unset_variable_is_named_with_the_mend(monkeypatch):
    monkeypatch.delenv("EP_OF_THIS_RUN", raising=False)
    message = refusal(yaml=parallelism(moe_ep_degree="${oc.env:EP_OF_THIS_RUN}"))
    assert "'EP_OF_THIS_RUN' not found" in message and "/x/ep2.yaml" in message
    assert "${oc.env:NAME,1}" in message


@pytest.mark.parametrize("text", ["${oc.env:EP_OF_THIS_RUN", "${nosuch:1}", "${num_processes}", "${oc.env:WORD}"])
def test_an_interpolation_that_cannot_work_is_refused_with_its_source(monkeypatch, text):
    monkeypatch.setenv("WORD", "abc")
    message = refusal(yaml=parallelism(moe_ep_degree=text))
    assert text in message and "a whole number of at least 1" in message and "/x/ep2.yaml" in message


def test_an_unset_variable_does_not_matter_where_the_value_is_overridden(monkeypatch):
    monkeypatch.delenv("EP_OF_THIS_RUN", raising=False)
    yaml = parallelism(moe_ep_degree="${oc.env:EP_OF_THIS_RUN}")
    assert resolve({"moe_ep_degree": 2}, environ={}, yaml=yaml).config.moe_ep_degree == 2
    assert resolve(environ={"ACCEL_MOE_EP_DEGREE": "2"}, yaml=yaml).config.moe_ep_degree == 2


def test_the_rest_of_the_yaml_is_not_interpolated(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    yaml = yaml_with(
        fsdp_config={"fsdp_version": "${oc.env:NOT_SET}"},
        parallelism_config={"parallelism_config_dp_shard_size": "${oc.env:NOT_SET}", "moe_ep_degree": 2},
    )
    assert resolve(environ={}, yaml=yaml).config.moe_ep_degree == 2


# ---- Wrong types and values


@pytest.mark.parametrize("value", ["abc", "", 2.5, 2.0, True, None, [2], {"a": 1}, 0, -1, "0"])
def test_a_degree_in_the_yaml_that_is_no_whole_number_of_at_least_one_is_refused(value):
    message = refusal(yaml=parallelism(moe_ep_degree=value))
    assert f"moe_ep_degree={value!r}" in message or "moe_ep_degree=0" in message
    assert "(/x/ep2.yaml (parallelism_config.moe_ep_degree)) is not a whole number of at least 1" in message
    assert "remove it for the default, 1" in message


@pytest.mark.parametrize("value", ["abc", "", "2.5", "true", "0", "-2"])
def test_a_degree_in_the_environment_that_is_no_whole_number_of_at_least_one_is_refused(value):
    message = refusal(environ={"ACCEL_MOE_EP_DEGREE": value})
    assert "(ACCEL_MOE_EP_DEGREE in the environment) is not a whole number of at least 1" in message


@pytest.mark.parametrize("value", ["2", 2.0, True, None, 0])
def test_an_argument_is_a_python_value_of_the_right_type_or_refused(value):
    message = refusal({"moe_ep_degree": value})
    assert f"moe_ep_degree={value!r} (argument to prepare()) is not a whole number of at least 1" in message


@pytest.mark.parametrize("value", [True, 3, None, "", "  "])
def test_a_kernel_that_is_no_name_is_refused(value):
    assert "is not a name" in refusal(yaml=parallelism(moe_kernel=value))
    assert "is not a name" in refusal({"moe_kernel": value})


@pytest.mark.parametrize("name", option_names())
@pytest.mark.parametrize("value", ["???", " ??? "])
def test_omegaconfs_marker_of_a_missing_value_is_not_taken_for_the_default(name, value):
    message = refusal(yaml=parallelism(**{name: value}))
    assert f"{name}={value!r} (/x/ep2.yaml (parallelism_config.{name})) is not" in message
    variable = config.environment_variable(name)
    assert f"({variable} in the environment) is not" in refusal(environ={variable: value})


@pytest.mark.parametrize("name", option_names())
@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_value_is_refused_for_every_option(name, value):
    assert f"{name}={value!r}" in refusal(yaml=parallelism(**{name: value}))
    if value is not None:
        assert f"{name}={value!r}" in refusal(environ={config.environment_variable(name): value})


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match=r"moe_ep_degree=0 \(MoEConfig\)"):
        MoEConfig(moe_ep_degree=0)


# ---- Unknown and misplaced keys


def test_an_unknown_key_in_the_yaml_names_the_nearest_option():
    message = refusal(yaml=parallelism(moe_ep_degre=2))
    assert "'moe_ep_degre' in parallelism_config of /x/ep2.yaml is no option of accel_moe" in message
    assert "Did you mean moe_ep_degree?" in message


def test_an_unknown_argument_names_the_nearest_option():
    assert "Did you mean moe_ep_degree?" in refusal({"ep_degree": 2})


def test_an_unknown_variable_names_the_nearest_variable():
    message = refusal(environ={"ACCEL_MOE_EP_DEGRE": "2"})
    assert "ACCEL_MOE_EP_DEGRE='2'" in message and "Did you mean ACCEL_MOE_EP_DEGREE?" in message


@pytest.mark.parametrize(
    "key",
    [
        "ep_degree",
        "MOE_EP_DEGREE",
        "moe-ep-degree",
        "parallelism_config_moe_ep_degree",
        "ACCEL_MOE_EP_DEGREE",
    ],
)
def test_a_key_that_can_only_be_meant_for_us_is_not_dropped_in_silence(key):
    assert "Did you mean moe_ep_degree?" in refusal(yaml=parallelism(**{key: 2}))


def test_a_key_inside_fsdp_config_is_sent_to_parallelism_config():
    message = refusal(yaml=yaml_with(fsdp_config={"fsdp_version": 2, "moe_ep_degree": 2}))
    assert message == (
        "moe_ep_degree is inside fsdp_config of /x/ep2.yaml, where it has no effect. Move it into parallelism_config."
    )


def test_a_key_at_the_top_level_is_sent_to_parallelism_config():
    message = refusal(yaml=yaml_with(moe_ep_degree=2))
    assert "moe_ep_degree is at the top level" in message and "Move it into parallelism_config" in message


def test_a_misplaced_unknown_key_hears_both():
    message = refusal(yaml=yaml_with(fsdp_config={"moe_ep": 2}))
    assert "Move it into parallelism_config" in message and "Did you mean moe_ep_degree?" in message


def test_a_mesh_size_without_accelerates_prefix_is_refused_with_the_prefixed_key():
    message = refusal(yaml=parallelism(dp_shard_size=2))
    assert "`dp_shard_size: 2`" in message and "Write `parallelism_config_dp_shard_size: 2`" in message


def test_another_librarys_key_in_parallelism_config_passes():
    assert resolve(environ={}, yaml=parallelism(somebody_elses=1)).config == MoEConfig()


def test_a_parallelism_config_that_is_no_mapping_is_refused():
    assert "is a list; expected a mapping" in refusal(yaml=yaml_with(parallelism_config=["moe_ep_degree"]))


@pytest.mark.parametrize(
    "path", ["parallelism_config", "parallelism_config.moe_ep_degree", "parallelism_config.parallelism_config_tp_size",
             "fsdp_config.moe_ep_degree", "fsdp_config.ep_degre"],
)  # fmt: skip
def test_a_key_given_twice_is_refused_where_the_one_that_is_dropped_may_be_ours(path):
    yaml = dataclasses.replace(parallelism(moe_ep_degree=2), repeated=(path,))
    assert f"{path} is given twice in /x/ep2.yaml" in refusal(yaml=yaml)


@pytest.mark.parametrize("path", ["num_processes", "fsdp_config", "fsdp_config.fsdp_version"])
def test_accelerates_own_key_given_twice_is_accelerates_matter(path):
    yaml = dataclasses.replace(parallelism(moe_ep_degree=2), repeated=(path,))
    assert resolve(environ={}, yaml=yaml).config.moe_ep_degree == 2


# ---- The missing launcher

WORLD = {"WORLD_SIZE": "8", "LOCAL_RANK": "0"}
UNSET, SET = {"moe_ep_degree": "default"}, {"moe_ep_degree": "argument to prepare()"}


def test_ranks_without_a_launcher_and_without_another_source_are_warned_with_the_variables_name():
    message = missing_launcher_warning(NO_LAUNCHER, UNSET, WORLD, {})
    assert message is not None and "8 ranks" in message and "ACCEL_MOE_EP_DEGREE" in message


@pytest.mark.parametrize(
    "why, yaml, sources, environ, modules",
    [
        ("a file without our key turns EP off, as asked", parallelism(), UNSET, WORLD, {}),
        ("the launcher read no file", LauncherYaml("no_file"), UNSET, WORLD, {}),
        ("the degree was set otherwise", NO_LAUNCHER, SET, WORLD, {}),
        ("one process", NO_LAUNCHER, UNSET, {"WORLD_SIZE": "1"}, {}),
        ("no ranks at all", NO_LAUNCHER, UNSET, {}, {}),
        ("another rank of the machine says it", NO_LAUNCHER, UNSET, {**WORLD, "LOCAL_RANK": "3"}, {}),
        ("a notebook", NO_LAUNCHER, UNSET, WORLD, {"ipykernel": None}),
        ("pytest", NO_LAUNCHER, UNSET, WORLD, {"pytest": None}),
        ("a rank that pytest started", NO_LAUNCHER, UNSET, {**WORLD, "PYTEST_CURRENT_TEST": "x"}, {}),
    ],
)
def test_the_warning_is_silent_when(why, yaml, sources, environ, modules):
    assert missing_launcher_warning(yaml, sources, environ, modules) is None, why


def test_resolve_gives_the_warning_itself(monkeypatch):
    monkeypatch.setattr(config.sys, "modules", {k: v for k, v in sys.modules.items() if k != "pytest"})
    with pytest.warns(UserWarning, match="ACCEL_MOE_EP_DEGREE"):
        resolve(environ=WORLD, yaml=NO_LAUNCHER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(environ={**WORLD, "ACCEL_MOE_EP_DEGREE": "1"}, yaml=NO_LAUNCHER)


# ---- Ranks


def rank(degree, source, kernel="auto"):
    return {"moe_ep_degree": (degree, source), "moe_kernel": (kernel, "default")}


def test_ranks_that_agree_give_no_message_whatever_their_sources():
    assert config_mismatch([rank(2, "/a.yaml"), rank(2, "/b.yaml"), rank(2, "default")]) is None
    assert config_mismatch([rank(2, "/a.yaml")]) is None


def test_ranks_that_differ_are_named_with_each_ones_source():
    message = config_mismatch([rank(2, "/a.yaml")] * 3 + [rank(1, "default")] + [rank(2, "/a.yaml")])
    assert message is not None
    assert "moe_ep_degree differs between ranks: 2 on ranks 0-2, 4 (/a.yaml), 1 on rank 3 (default)." in message
    assert "moe_kernel" not in message
    assert "same --config_file" in message


def test_every_option_that_differs_is_named():
    message = config_mismatch([rank(2, "/a.yaml"), rank(1, "default", kernel="eager")])
    assert message is not None and "moe_ep_degree differs" in message and "moe_kernel differs" in message


def test_values_that_python_calls_equal_but_are_not_the_same_option_value_differ():
    assert config_mismatch([rank(1, "x"), rank(True, "x")]) is not None


def test_a_rank_that_does_not_know_an_option_is_named():
    message = config_mismatch([rank(1, "default"), {"moe_ep_degree": (1, "default")}])
    assert message is not None and "unknown on rank 1 (an older accel_moe?)" in message


def test_what_a_rank_hands_over_for_comparison_is_what_resolve_found():
    resolved = resolve({"moe_ep_degree": 2}, environ={}, yaml=NO_LAUNCHER)
    assert resolved.for_comparison() == {
        "moe_ep_degree": (2, "argument to prepare()"),
        "moe_kernel": ("auto", "default"),
        "moe_dispatcher": ("auto", "default"),
        "moe_dispatch_chunk_tokens": (0, "default"),
        "moe_recompute_up_projection": (False, "default"),
        "moe_quantize_experts": ("none", "default"),
        "moe_keep_exchanged": (True, "default"),
        "moe_async_save": (False, "default"),
        "moe_verify": ("checksums", "default"),
    }


# ---- The table, and what this module needs


def test_the_table_has_a_row_with_help_for_every_option():
    rows = options_table().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(MoEConfig))
    assert rows[0].startswith("| `moe_ep_degree` | `ACCEL_MOE_EP_DEGREE` | `1` | How many ranks")
    assert all(entry.name.startswith("moe_") and entry.metadata["help"] for entry in dataclasses.fields(MoEConfig))


def test_the_module_and_plain_arguments_do_without_omegaconf():
    script = (
        "import sys; sys.modules['omegaconf'] = None\n"
        "from accel_moe.config import MoEConfig, resolve\n"
        "from accel_moe.launcher import LauncherYaml\n"
        "assert MoEConfig().moe_ep_degree == 1\n"
        "resolved = resolve({'moe_ep_degree': 2}, environ={}, yaml=LauncherYaml('no_launcher'))\n"
        "assert resolved.config.moe_ep_degree == 2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_an_option_with_choices_takes_one_of_them():
    assert resolve({"moe_verify": "sizes"}, environ={}, yaml=LauncherYaml("no_launcher")).config.moe_verify == "sizes"
    with pytest.raises(ValueError, match=r"moe_verify.*crc.*checksums or sizes"):
        resolve({"moe_verify": "crc"}, environ={}, yaml=LauncherYaml("no_launcher"))
