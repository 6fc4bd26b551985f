"""Patches on a leash: installed once, undoable, refusing loudly."""

import sys
import types

import pytest

import accel_moe
from accel_moe import hooks
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def put_back():
    hooks.uninstall()  # another test's prepare() may have left them installed
    yield
    hooks.uninstall()


def test_importing_patches_nothing_and_prepare_installs_the_table():
    assert hooks.installed() == []
    accel_moe.prepare(tiny_model())
    with_peft = hooks.PEFT_TABLE if "peft.tuners.lora.layer" in sys.modules else ()
    assert hooks.installed() == [patch.target for patch in (*hooks.TABLE, *with_peft)]


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
    patch = hooks.Patch("moved_away.target", ("a",), lambda original: original, "so that the test is true")
    with pytest.raises(RuntimeError, match=r"parameters \('a', 'b'\) where it expected \('a',\).*the test is true"):
        hooks._install(patch)


def test_a_target_that_is_gone_is_refused():
    patch = hooks.Patch("accelerate.accelerator.no_such_name", (), lambda original: original, "")
    with pytest.raises(RuntimeError, match=r"accelerate\.accelerator\.no_such_name, which this version does not have"):
        hooks._install(patch)


@pytest.mark.parametrize("patch", [*hooks.TABLE, *hooks.CPU_TABLE, *hooks.PEFT_TABLE], ids=lambda patch: patch.target)
def test_every_row_gives_its_reason_and_tested_versions(patch):
    assert patch.reason.endswith(".") and patch.tested


def test_deepspeed_with_expert_parallelism_is_refused_by_name():
    from accelerate.utils import DistributedType

    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2)
    accelerator = types.SimpleNamespace(is_fsdp2=False, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"moe_ep_degree=2 .* needs FSDP2, but this Accelerator runs DEEPSPEED"):
        hooks._check_accelerator(accelerator, model, model._accel_moe)


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
