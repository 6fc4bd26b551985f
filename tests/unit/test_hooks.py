"""Patches on a leash: installed once, undoable, refusing loudly."""

import dataclasses
import logging
import sys
import types

import accelerate
import pytest

import accel_moe
from accel_moe import hooks, in_accelerator, patching, supported
from accel_moe.patching import Patch, patch
from accel_moe.whereabouts import get_state_dict
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def put_back():
    hooks.uninstall()  # another test's prepare() may have left them installed
    yield
    hooks.uninstall()


def rows_to_install() -> list[str]:
    with_peft = hooks.PEFT_TABLE if "peft.tuners.lora.layer" in sys.modules else ()
    return [patch.target for patch in (*hooks.TABLE, *with_peft)]


def test_importing_patches_nothing_and_prepare_installs_the_table():
    assert hooks.installed() == []
    accel_moe.prepare(tiny_model())
    assert hooks.installed() == rows_to_install()


def test_uninstall_puts_the_originals_back():
    import accelerate.accelerator

    before = accelerate.accelerator.fsdp2_prepare_model, accelerate.Accelerator.prepare
    hooks.install()
    assert accelerate.accelerator.fsdp2_prepare_model is not before[0]
    hooks.install()
    hooks.uninstall()
    assert (accelerate.accelerator.fsdp2_prepare_model, accelerate.Accelerator.prepare) == before


def test_a_target_whose_parameters_moved_is_refused_with_the_reason(monkeypatch):
    module = types.ModuleType("moved_away")
    module.target = lambda a, b: None
    monkeypatch.setitem(sys.modules, "moved_away", module)
    moved = Patch("moved_away.target", lambda original, a: None, "so that the test is true", "")
    with pytest.raises(RuntimeError, match=r"parameters \('a', 'b'\) where it expected \('a',\).*the test is true"):
        patching.install([moved])


@pytest.mark.parametrize(
    "target", ["accelerate.accelerator.no_such_name", "accelerate.NoSuchClass.prepare", "accelerate.no_such_file.name"]
)
def test_a_target_that_is_gone_is_refused_with_what_was_found_and_what_was_tested(target):
    gone = Patch(target, lambda original: None, "", supported.words("accelerate"))
    found = (
        rf"{target}, which this version does not have \(accelerate {accelerate.__version__}; tested with accelerate 1"
    )
    with pytest.raises(RuntimeError, match=found):
        patching.install([gone])


def test_a_target_that_is_no_function_any_more_is_refused():
    no_function = Patch("accelerate.__version__", lambda original: None, "", "")
    with pytest.raises(RuntimeError, match=r"accelerate\.__version__, which is no function here"):
        patching.install([no_function])


def test_one_row_off_its_leash_leaves_none_in_place(monkeypatch):
    off = dataclasses.replace(hooks.TABLE[-1], function=lambda original, something, else_: None)
    monkeypatch.setattr(hooks, "TABLE", (*hooks.TABLE[:-1], off))
    with pytest.raises(RuntimeError, match=r"where it expected \('something', 'else_'\)"):
        accel_moe.prepare(tiny_model())
    assert hooks.installed() == []


class Owner:
    def method(self, a, *, b=2):
        return "method", a, b

    @staticmethod
    def static(a):
        return "static", a


@patch(f"{__name__}.Owner.method", why="It is a test.", tested="everything")
def shout(original, self, a, *, b=3):
    return original(self, a, b=b), "shouted"


@patch(f"{__name__}.Owner.static", why="It is a test.", tested="everything")
def twice(original, a):
    return original(a), original(a)


def test_a_patch_is_given_what_it_replaces_and_binds_as_it_did():
    before = dict(vars(Owner))
    patches = patching.patches_of(shout, twice)
    patching.install(patches)
    try:
        assert Owner().method(1) == (("method", 1, 3), "shouted")
        assert Owner.static(1) == Owner().static(1) == (("static", 1), ("static", 1))
        assert Owner.method.__name__ == "method" and isinstance(vars(Owner)["static"], staticmethod)
        assert not any(map(patching.off_leash, patches))
        patching.install(patches)
    finally:
        patching.uninstall(patches)
    assert vars(Owner)["method"] is before["method"] and vars(Owner)["static"] is before["static"]


def test_a_module_has_the_patches_that_it_defines_in_order_and_none_that_it_imports():
    here = sys.modules[__name__]
    assert patching.patches_of(get_state_dict), "one that is imported here"
    assert [one.target.rpartition(".")[2] for one in patching.patches_of(here)] == ["method", "static"]


@pytest.fixture
def forget_what_was_said():
    hooks._warn_of_untested_versions.cache_clear()
    yield
    hooks._warn_of_untested_versions.cache_clear()


@pytest.fixture
def newer_transformers(monkeypatch, forget_what_was_said):
    here = supported.installed
    monkeypatch.setattr(supported, "installed", lambda name: "97.1.0.dev0" if name == "transformers" else here(name))


def said_by_prepare(caplog):
    with caplog.at_level(logging.WARNING, "accel_moe"):
        accel_moe.prepare(tiny_model())
        accel_moe.prepare(tiny_model())
    return [record.getMessage() for record in caplog.records if record.name == "accel_moe"]


def test_a_newer_version_than_was_tested_is_one_warning_and_works(newer_transformers, caplog):
    (message,) = said_by_prepare(caplog)
    assert "transformers 97.1.0.dev0 (tested: 5.17 to " in message
    assert "python -m accel_moe.families --check" in message and "install a tested version" in message
    assert hooks.installed() == rows_to_install()


def test_a_newer_version_is_spoken_of_by_one_rank(newer_transformers, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    assert said_by_prepare(caplog) == []


@pytest.mark.core
def test_the_installed_versions_are_tested_ones_and_nothing_is_said(caplog, forget_what_was_said):
    assert said_by_prepare(caplog) == []


@pytest.mark.parametrize(
    ("found", "verdict"),
    [("5.16.9", "too old"), ("5.17.0", "ok"), ("5.24.7", "ok"), ("5.25.0.dev0", "untested"), ("6", "untested")],
)
def test_a_version_is_judged_by_its_minor_number(found, verdict):
    assert supported.Range("transformers", "5.17", "5.24").verdict(found) == verdict


def test_a_version_that_is_not_there_is_missing_unless_none_is_needed():
    assert supported.Range("torch", "2.11", "2.15").verdict(None) == "missing"
    assert supported.Range("triton", "", "").verdict(None) == "ok"


@pytest.mark.parametrize(
    "patch", [*hooks.TABLE, *hooks.CPU_TABLE, *hooks.LOAD_TABLE, *hooks.PEFT_TABLE], ids=lambda patch: patch.target
)
def test_every_row_gives_its_reason_and_tested_versions(patch):
    assert patch.why.endswith(".") and patch.tested


def test_deepspeed_with_expert_parallelism_is_refused_by_name():
    from accelerate.utils import DistributedType, TorchDynamoPlugin

    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2)
    accelerator = types.SimpleNamespace(
        is_fsdp2=False,
        distributed_type=DistributedType.DEEPSPEED,
        state=types.SimpleNamespace(dynamo_plugin=TorchDynamoPlugin()),
        parallelism_config=None,
        mixed_precision="no",
    )
    with pytest.raises(ValueError, match=r"moe_ep_degree=2 .* needs FSDP2, but this Accelerator runs DEEPSPEED"):
        in_accelerator._check_accelerator(accelerator, model._accel_moe)


@pytest.mark.parametrize("degree", [1, 2])
def test_a_checkpointed_layer_is_compiled_inside_its_checkpoint_where_ranks_exchange(degree):
    import accelerate.accelerator
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = accel_moe.prepare(tiny_model(), moe_ep_degree=degree)
    layers = model.model.layers
    for at, layer in enumerate(layers):
        layers[at] = checkpoint_wrapper(layer)
    accelerate.accelerator.compile_regions_fsdp2(model, backend="eager")
    for wrapper in layers:
        inside = wrapper._checkpoint_wrapped_module._compiled_call_impl is not None
        outside = wrapper._compiled_call_impl is not None
        assert (inside, outside) == (degree > 1, degree == 1)
        assert "compile" not in vars(wrapper)
