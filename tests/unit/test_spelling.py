"""Names that are nearly an option: each is refused with the right name or taken, never ignored; others pass."""

import os
import random
import string
import warnings

import pytest

from accel_moe.config import MoEConfig, environment_variable, option_names, resolve
from accel_moe.launcher import LauncherYaml, accelerate_keys

NO_LAUNCHER = LauncherYaml("no_launcher")
ELSEWHERE = ("fsdp_config", "dynamo_config", "fp8_config", "mpirun_config", "")


def yaml_of(section, key, value=2):
    body = {section: {key: value}} if section else {key: value}
    return LauncherYaml("found", path="/x/ep2.yaml", content={"distributed_type": "FSDP", **body})


def outcome(yaml=NO_LAUNCHER, environ=None):
    """The ValueError's text, "taken" or "ignored"; a warning that names the variable is no silence, either."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            resolved = resolve(environ=environ or {}, yaml=yaml)
        except ValueError as error:
            return str(error)
    if warned:
        return str(warned[0].message)
    return "taken" if set(resolved.sources.values()) != {"default"} else "ignored"


def edits(name, alphabet):
    """Every name one insertion, deletion, change or swap away."""
    cuts = [(name[:i], name[i:]) for i in range(len(name) + 1)]
    for before, after in cuts:
        yield from (before + c + after for c in alphabet)
        if after:
            yield before + after[1:]
            yield from (before + c + after[1:] for c in alphabet)
        if len(after) > 1:
            yield before + after[1] + after[0] + after[2:]


def slips(name, alphabet, number, seed):
    """Some names one edit away, and as many two edits away; the same ones at every run."""
    rng = random.Random(seed)
    once = sorted(set(edits(name, alphabet)) - {name})
    found = rng.sample(once, min(number, len(once)))
    twice = [rng.choice(list(edits(word, alphabet))) for word in found]
    return [word for word in found + twice if word and word != name]


def respelt(name):
    """An option in other people's spellings."""
    words = name.split("_")
    camel = words[0] + "".join(word.title() for word in words[1:])
    plain = [name, name.upper(), name.replace("_", "-"), name.replace("_", "."), name.replace("_", ""), camel]
    plain += ["".join(word.title() for word in words), name.replace("_", "__"), name.replace("_", " ")]
    prefixes = ("accel_", "accel_moe_", "accelmoe_", "accelerate_", "parallelism_config_", "fsdp_")
    return [*plain, *(prefix + name for prefix in prefixes)]


OTHERS_NAMES = (
    "ep", "ep_size", "ep_degree", "moe_ep", "moe_ep_size", "ep_world_size", "enable_ep", "expert_parallel",
    "expert_parallel_size", "expert_parallel_degree", "expert_parallelism", "expert_model_parallel_size",
    "moe_expert_parallel_size", "expert_tensor_parallel_size", "expert_tensor_parallel_degree", "etp_size",
    "enable_expert_parallel", "expert_parallel_world_size", "num_expert_parallel", "expert-parallel-size",
    "parallelism_config_ep_size", "parallelism_config_ep_degree", "parallelism_config_expert_parallel_size",
    "expert_paralel_size", "EP_SIZE", "epSize", "expertParallelSize", "ep_degre", "mo_ep_degree",
)  # fmt: skip


def assert_heard(names, place, told=None):
    ignored = [name for name in names if place(name) == "ignored"]
    assert not ignored, f"{len(ignored)} of {len(names)} names were ignored: {ignored[:20]}"
    if told is not None:
        wrong = [name for name in names if told not in place(name)]
        assert not wrong, (wrong[:5], place(wrong[0]))


@pytest.mark.parametrize("option", option_names())
def test_a_slip_in_an_options_name_is_never_ignored_in_parallelism_config(option):
    names = slips(option, string.ascii_lowercase + "_", 40, option)
    bare = option.removeprefix("moe_")
    once = sorted(set(edits(bare, string.ascii_lowercase)) - {bare, ""})
    names += random.Random(option).sample(once, 40)
    assert_heard(names, lambda name: outcome(yaml_of("parallelism_config", name)))


@pytest.mark.parametrize("section", ELSEWHERE)
def test_a_slip_in_an_options_name_is_never_ignored_elsewhere_in_the_file(section):
    names = [slip for option in option_names() for slip in slips(option, string.ascii_lowercase + "_", 12, option)]
    assert_heard(names, lambda name: outcome(yaml_of(section, name)))


@pytest.mark.parametrize("option", option_names())
def test_a_slip_in_a_variables_name_is_never_ignored(option):
    names = slips(environment_variable(option), string.ascii_uppercase + "_", 40, option)
    assert_heard(names, lambda name: outcome(environ={name: "2"}))


@pytest.mark.slow
@pytest.mark.parametrize("option", option_names())
def test_thousands_of_slips_are_never_ignored_in_any_place(option):
    names = slips(option, string.ascii_letters + "_-", 1500, option)
    assert_heard(names, lambda name: outcome(yaml_of("parallelism_config", name)))
    for section in ELSEWHERE:
        assert_heard(names[::4], lambda name: outcome(yaml_of(section, name)))  # noqa: B023
    variables = slips(environment_variable(option), string.ascii_letters + "_", 1500, option)
    assert_heard(variables, lambda name: outcome(environ={name: "2"}))


@pytest.mark.parametrize("option", option_names())
def test_another_spelling_of_an_option_is_answered_with_its_name_wherever_it_stands(option):
    names = [name for name in respelt(option) if name != option]
    assert_heard(names, lambda name: outcome(yaml_of("parallelism_config", name)), f"Did you mean {option}?")
    for section in ELSEWHERE:
        assert_heard(respelt(option), lambda name: outcome(yaml_of(section, name)), option)  # noqa: B023
    variable = environment_variable(option)
    names = [name for name in [*respelt(option), *respelt(option.upper()), variable.lower()] if name != variable]
    assert_heard(names, lambda name: outcome(environ={name: "2"}), f"Did you mean {variable}?")


@pytest.mark.parametrize("name", OTHERS_NAMES)
def test_another_projects_name_for_expert_parallelism_is_answered_with_ours(name):
    assert "Did you mean moe_ep_degree?" in outcome(yaml_of("parallelism_config", name))
    assert "moe_ep_degree" in outcome(yaml_of("fsdp_config", name))
    assert "ACCEL_MOE_EP_DEGREE" in outcome(environ={f"MOE_{name.removeprefix('parallelism_config_')}".upper(): "8"})


@pytest.mark.parametrize("variable", ["MOE_EP_DEGREE", "MO_EP_DEGREE", "ACCELMOE_EP_DEGREE", "ACCELMOE_ANYTHING"])
def test_a_variable_that_is_nearly_ours_is_refused(variable):
    message = outcome(environ={variable: "2"})
    assert f"{variable}='2' in the environment sets no option of accel_moe" in message
    assert "Did you mean ACCEL_MOE_" in message


@pytest.mark.parametrize(
    "variable",
    ["ACCEL_MOE", "accel_moe_ep_degree", "ACCEL-MOE-EP-DEGREE", "ACCELL_MOE_EP_DEGREE", "ACCELERATE_MOE_EP_DEGREE",
     "ACCEL_MEO_KERNEL", "FSDP_MOE_EP_DEGREE", "PARALLELISM_CONFIG_MOE_EP_DEGREE", "PARALLELISM_CONFIG_EP_SIZE",
     "MOE_EP_SIZE", "MOE_EXPERT_PARALLEL_SIZE"],
)  # fmt: skip
def test_other_forms_of_a_variable_are_refused(variable):
    assert "sets no option of accel_moe" in outcome(environ={variable: "2"})


@pytest.mark.parametrize("variable", ["EP_SIZE", "EP_DEGREE", "EXPERT_PARALLEL_SIZE", "EP"])
def test_a_variable_that_may_be_a_scripts_own_is_warned_of_where_the_degree_is_set_nowhere(variable):
    assert "expert parallelism is off" in outcome(environ={variable: "8"})
    assert outcome(environ={variable: "1"}) == outcome(environ={variable: ""}) == "ignored"
    assert outcome(environ={variable: "8", "ACCEL_MOE_EP_DEGREE": "8"}) == "taken"
    assert outcome(environ={variable: "8", "LOCAL_RANK": "1"}) == "ignored"  # rank 0 of the machine says it


@pytest.mark.parametrize("variable", ["EP_SIZE", "MOE_EP_DEGREE", "accel_moe_ep_degree"])
def test_a_variable_that_the_yaml_refers_to_may_have_any_name(variable, monkeypatch):
    monkeypatch.setenv(variable, "4")
    yaml = yaml_of("parallelism_config", "moe_ep_degree", f"${{oc.env:{variable},1}}")
    assert resolve(environ={variable: "4"}, yaml=yaml).config.moe_ep_degree == 4


def test_a_variable_that_the_yaml_refers_to_under_another_librarys_key_is_ours_all_the_same():
    yaml = yaml_of("parallelism_config", "somebody_elses", "${oc.env:MOE_EP_DEGREE}")
    assert "sets no option" in outcome(yaml, {"MOE_EP_DEGREE": "4"})


# ---- No false alarm

INNOCENT_VARIABLES = (
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE", "PARALLELISM_CONFIG_TP_SIZE",
    "PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_CP_BACKEND", "PARALLELISM_CONFIG_CP_COMM_STRATEGY",
    "PARALLELISM_CONFIG_SP_SIZE", "PARALLELISM_CONFIG_SP_BACKEND", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_MODE", "ACCELERATE_DYNAMO_MODE",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CONFIG_FILE", "FSDP_VERSION",
    "FSDP_STATE_DICT_TYPE", "MEGATRON_LM_EXPERT_MODEL_PARALLEL_SIZE", "MEGATRON_LM_TP_DEGREE", "ACCEL_MODE",
    "ACCEL_MODEL_PATH", "ACCELERATOR_TYPE", "MOE_LAYER_FREQ", "MOE_CAPACITY_FACTOR", "MOE_TOP_K", "MOE_AUX_LOSS_COEFF",
    "MOE_TOKEN_DISPATCHER_TYPE", "MOE_ROUTER_TOPK", "MOE_KERNEL_PATH", "MOE_LOG_DIR", "MOE_NUM_EXPERTS", "MOE_DEBUG",
    "MODE_VERIFY", "MODEL_KERNEL", "NODE_VERIFY", "VLLM_FUSED_MOE_CHUNK_SIZE", "VLLM_MOE_DP_CHUNK_SIZE",
    "SGLANG_MOE_PADDING", "TORCH_MOE", "NUM_EXPERTS", "EXPERTS", "TOP_K_EXPERTS", "KERNEL", "KERNEL_NAME", "VERIFY",
    "VERIFY_SSL", "ASYNC_SAVE", "DISPATCHER", "EPOCHS", "EPS", "EPSILON", "STEP_SIZE", "DEEPEP_HOME", "DEGREE",
    "SCATTERMOE_CACHE", "SCATTERMOE_AUTOTUNE", "MOE", "MOE_", "ACCEL", "_", "", "HF_HOME", "WORLD_SIZE", "RANK",
    "MY_RUNS_MOE_EP_DEGREE",
)  # fmt: skip


def test_variables_of_others_pass():
    heard = {name: told for name in INNOCENT_VARIABLES if (told := outcome(environ={name: "2"})) != "ignored"}
    assert not heard, heard
    assert outcome(environ={name: "2" for name in os.environ}) == "ignored"


def test_every_key_of_accelerates_own_passes_where_accelerate_reads_it():
    own = accelerate_keys()
    for section in ("fsdp_config", "deepspeed_config", "megatron_lm_config", "dynamo_config", "fp8_config"):
        prefix = section.removesuffix("_config") + "_"
        keys = [key for key in own if key.startswith(prefix)]
        content = {section: dict.fromkeys([*keys, *(key.removeprefix(prefix) for key in keys)], 2)}
        yaml = LauncherYaml("found", path="/x.yaml", content=content)
        assert resolve(environ={}, yaml=yaml).config == MoEConfig()
    ours = dict.fromkeys(key for key in own if key.startswith("parallelism_config_"))
    yaml = LauncherYaml("found", path="/x.yaml", content={**dict.fromkeys(own), "parallelism_config": ours})
    assert resolve(environ={}, yaml=yaml).config == MoEConfig()


@pytest.mark.parametrize(
    "key", ["somebody_elses", "mesh_name", "comment", "pipeline", "experimental", "steps", "shape"]
)
def test_a_key_of_nobody_we_know_passes(key):
    for section in ("parallelism_config", "fsdp_config", "deepspeed_config"):
        assert outcome(yaml_of(section, key)) == "ignored"


@pytest.mark.parametrize("section", ["deepspeed_config", "megatron_lm_config"])
def test_an_engines_own_expert_parallelism_passes_in_its_section_and_our_options_do_not(section):
    assert outcome(yaml_of(section, "expert_parallel_size")) == "ignored"
    assert "Move it into parallelism_config" in outcome(yaml_of(section, "moe_ep_degree"))
    assert "Move it into parallelism_config" in outcome(yaml_of(section, "moe_ep_degre"))


# ---- Accelerate's own keys, in our section


@pytest.mark.parametrize("key", ["dp_shard_size", "dp_shard", "tp", "tp_size", "cp"])
def test_a_mesh_size_that_accelerate_does_not_read_is_answered_with_the_key_that_it_does(key):
    name = f"parallelism_config_{key.removesuffix('_size')}_size"
    assert f"Write `{name}: 2`" in outcome(yaml_of("parallelism_config", key))


def test_a_key_with_accelerates_prefix_that_accelerate_does_not_know_is_refused():
    message = outcome(yaml_of("parallelism_config", "parallelism_config_dp_shrad_size"))
    assert "accelerate has no such key" in message and "parallelism_config_dp_shard_size" in message
