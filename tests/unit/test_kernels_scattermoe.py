"""The registered forward: which modules it takes, what it says of the others, and what it costs to import."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from accel_moe.kernels.scattermoe import activation_name, scattermoe_experts_forward, unsupported_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def view(**changes):
    E, H, I = 3, 16, 24
    gen = torch.Generator().manual_seed(0)
    module = SimpleNamespace(
        gate_up_proj=torch.randn(E, 2 * I, H, generator=gen).to(DEVICE) / 4,
        down_proj=torch.randn(E, H, I, generator=gen).to(DEVICE) / 4,
        act_fn=torch.nn.SiLU(),
        num_experts=E,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
    )
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def test_importing_the_registered_forward_does_not_import_triton():
    # torch may import Triton by itself; our own Triton code must not have been reached.
    code = "import sys, accel_moe.kernels.scattermoe; sys.exit('accel_moe.kernels.gemm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_gate": False}, "has no gate"),
        ({"has_bias": True}, "has biases"),
        ({"is_transposed": True}, "transposed"),
        ({"is_concatenated": False}, "interleaves"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"_apply_gate": lambda x: x}, "_apply_gate"),
        ({"act_fn": torch.nn.Softplus()}, "Softplus"),
        ({"down_proj": torch.zeros(2, 2)}, "3-dimensional"),
    ],
)
def test_an_unknown_kind_of_experts_is_refused_by_what_was_found(changes, reason):
    module = view(**changes)
    assert reason in unsupported_reason(module)
    with pytest.raises(ValueError, match=reason):
        scattermoe_experts_forward(module, torch.zeros(1, 16), torch.zeros(1, 1).long(), torch.zeros(1, 1))


def test_a_module_that_is_no_experts_module_is_refused():
    assert "has_gate" in unsupported_reason(torch.nn.Linear(2, 2))


def test_activations_of_transformers_are_recognised():
    act2fn = pytest.importorskip("transformers.activations").ACT2FN
    names = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh"}
    names |= {
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
        "tanh": None,
        "quick_gelu": None,
    }
    assert {name: activation_name(act2fn[name]) for name in names} == names


def test_autocast_computes_as_linear_would_and_returns_the_input_dtype():
    if DEVICE == "cpu":
        pytest.skip("bf16 products are wrong in Triton's interpreter")
    module, x = view(), torch.randn(5, 16, device=DEVICE)
    index, weights = torch.tensor([[0], [1], [2], [0], [1]], device=DEVICE), torch.ones(5, 1, device=DEVICE)
    exact = scattermoe_experts_forward(module, x, index, weights)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = scattermoe_experts_forward(module, x, index, weights)
    assert out.dtype == torch.float32
    assert 0 < (out - exact).norm() / exact.norm() < 2e-2


def test_mixtral_experts_of_transformers_give_their_eager_output():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    module = modeling.MixtralExperts(config).to(DEVICE)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert unsupported_reason(module) is None
    x = torch.randn(11, 16, device=DEVICE)
    weights, index = torch.rand(11, 3, device=DEVICE).topk(2)
    expected = module(x, index, weights)
    torch.testing.assert_close(scattermoe_experts_forward(module, x, index, weights), expected, rtol=1e-5, atol=1e-5)
