"""CONTRIBUTING.md shows how to add a dispatcher, a gate, a weight storage and a checkpoint format from outside. The
code, taken from the page, runs here."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.distributed.parity import Case, accelerator_for
from tests.ranks import run_ranks
from tests.tiny import batches, tiny_model

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
NAME = "every_token_everywhere"


def code_of_the_page(section: str) -> str:
    shown = CONTRIBUTING.read_text().split(f"<!-- {section}:begin -->")[1].split(f"<!-- {section}:end -->")[0]
    return re.fullmatch(r"\s*```python\n(.*)```\s*", shown, re.DOTALL)[1]


@contextmanager
def put_back(registry: dict) -> Iterator[None]:
    """Afterwards the registry is as it was."""
    before = dict(registry)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def run_code_of_the_page(section: str) -> None:
    exec(compile(code_of_the_page(section), str(CONTRIBUTING), "exec"), {"__name__": f"my_{section}"})


def train_a_step(dispatcher: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, gradient norm, {name: whole gradient}) of a tiny model's step at ep 2, on this rank."""
    run_code_of_the_page("dispatcher")
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = tiny_model()
    accelerator = accelerator_for(Case(2, 2), model)
    model = accel_moe.prepare(model, moe_ep_degree=2, moe_dispatcher=dispatcher)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    # the ranks bring different numbers of tokens
    first, rest = batches(1)[0].split([3, 5])
    tokens = (first, rest)[accelerator.process_index].to(accelerator.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    gradients = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}
    norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    return loss.item(), norm, gradients


@pytest.mark.core
def test_the_dispatcher_of_contributing_trains_a_step_as_auto_does():
    ours, theirs = run_ranks(train_a_step, 2, "auto"), run_ranks(train_a_step, 2, NAME)
    for (loss, norm, gradients), (shown_loss, shown_norm, shown_gradients) in zip(ours, theirs):
        # fp32 sums over ranks in another order
        assert shown_loss == pytest.approx(loss, rel=1e-6)
        assert shown_norm == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(shown_gradients, gradients, rtol=1e-5, atol=1e-6)


def test_a_dispatcher_that_nobody_registered_is_refused_by_name():
    import accel_moe

    with pytest.raises(ValueError, match=r"moe_dispatcher='nobodys' is not registered\. Use one of .*auto"):
        accel_moe.prepare(tiny_model(), moe_dispatcher="nobodys")


def in_float8(model: torch.nn.Module, *, stored: bool) -> torch.nn.Module:
    """The experts frozen, in float8; or, not `stored`, in fp32 with the values that float8 leaves of them."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            rounded = parameter.detach().to(torch.float8_e4m3fn)
            setattr(experts, name, torch.nn.Parameter(rounded if stored else rounded.float(), requires_grad=False))
    return model


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tokens = batches(1)[0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def only_activations_of_ours():
    from accel_moe.kernels.activations import ACTIVATIONS

    with put_back(ACTIVATIONS):
        yield


@pytest.mark.core
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
def test_the_gate_of_contributing_computes_as_the_model_itself_does(only_activations_of_ours, tmp_path, monkeypatch):
    import accel_moe

    def with_softsign():
        model = tiny_model()
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = torch.nn.Softsign()
        return model

    expected = gradients_of(with_softsign())
    with pytest.raises(ValueError, match="a gate that the kernels do not know"):
        accel_moe.prepare(with_softsign(), moe_kernel="scattermoe")
    (tmp_path / "my_gate.py").write_text(code_of_the_page("gate"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_gate")
    # the same fp32 products in another order
    torch.testing.assert_close(
        gradients_of(accel_moe.prepare(with_softsign(), moe_kernel="scattermoe")), expected, rtol=1e-4, atol=1e-6
    )


@pytest.fixture
def only_storages_of_ours():
    from accel_moe.experts.storage import STORAGES

    with put_back(STORAGES):
        yield


@pytest.mark.core
def test_the_storage_of_contributing_computes_with_frozen_float8_experts(only_storages_of_ours):
    import accel_moe

    with pytest.raises(ValueError, match="quantised"):
        accel_moe.prepare(in_float8(tiny_model(), stored=True))
    run_code_of_the_page("storage")
    found = gradients_of(accel_moe.prepare(in_float8(tiny_model(), stored=True)))
    expected = gradients_of(in_float8(tiny_model(), stored=False))
    assert found.keys() == expected.keys() and not any("experts" in name for name in found)
    # the same fp32 weights in another function
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def sharded_float8_experts() -> tuple[dict[str, torch.Tensor], set[torch.dtype]]:
    """(gradients of a step at ep 2, whole; dtypes of this rank's experts)."""
    import accel_moe
    import accel_moe.cpu

    run_code_of_the_page("storage")
    accel_moe.cpu.enable()
    model = in_float8(tiny_model(), stored=True)
    accelerator = accelerator_for(Case(2, 2), model)
    model = accel_moe.prepare(model, moe_ep_degree=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.1))
    tokens = batches(1)[0].chunk(2)[accelerator.process_index]
    accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
    gradients = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, {p.to_local().dtype for name, p in model.named_parameters() if "experts" in name}


def test_experts_in_a_storage_of_ones_own_are_sharded_as_they_are():
    expected = gradients_of(in_float8(tiny_model(), stored=False))
    for found, dtypes in run_ranks(sharded_float8_experts, 2):
        assert dtypes == {torch.float8_e4m3fn}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_format_of_contributing_is_consolidated(tmp_path, capsys):
    from accel_moe.checkpoint.opened import FORMATS
    from tests.exports import assert_same_tensors, make_trained, read_weights, run

    _, base, expected = make_trained(tmp_path, "qwen3_moe")
    folder = tmp_path / "mine"
    folder.mkdir()
    torch.save(dict(tiny_model("qwen3_moe", seed=5).state_dict()), folder / "weights.pt")
    with put_back(FORMATS):
        run_code_of_the_page("format")
        assert run("--verify", folder, tmp_path / "out", base) == 0, capsys.readouterr().err
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
