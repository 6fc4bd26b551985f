"""The registered forward: which modules it takes, what it says of the others, and what it costs to import."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from accel_moe.kernels.glu import Glu, activation_name, glu_of
from accel_moe.kernels.hints import Hints
from accel_moe.kernels.scattermoe import scattermoe_experts_forward, unsupported_reason

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
    module._apply_gate = lambda h: module.act_fn(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    module._apply_gate.__name__ = "_default_apply_gate"
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
        ({"is_concatenated": False}, "interleaves"),
        ({"has_post_expert_norm": True}, "normalises"),
        ({"has_gate": False}, "up_proj"),
        ({"has_bias": True}, "gate_up_proj_bias"),
        ({"down_proj": torch.zeros(2, 2)}, "3-dimensional"),
        ({"act_fn": torch.nn.Tanh()}, r"\.act_fn computes a gate that the kernels do not know"),
        (
            {"_apply_gate": lambda h: torch.sin(h.chunk(2, -1)[0])},
            r"\._apply_gate computes a gate that",
        ),
        (
            {"has_gate": False, "up_proj": torch.zeros(3, 24, 16), "act_fn": torch.nn.Tanh()},
            r"\.act_fn computes a gate that the kernels do not know",
        ),
    ],
)
def test_an_unknown_kind_of_experts_is_refused_by_what_was_found(changes, reason):
    module = view(**changes)
    assert re.search(reason, unsupported_reason(module))
    with pytest.raises(ValueError, match=reason):
        scattermoe_experts_forward(module, torch.zeros(1, 16), torch.zeros(1, 1).long(), torch.zeros(1, 1))


def eager(module, x, index, weights):
    """Every family's meaning: up, gate, down, each as the module's attributes say."""
    out = torch.zeros_like(x)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    for e in range(module.num_experts):
        token, k = torch.where(index == e)
        w1, w2 = getattr(module, up)[e], module.down_proj[e]
        w1, w2 = (w1, w2) if module.is_transposed else (w1.T, w2.T)
        h = x[token] @ w1 + (getattr(module, f"{up}_bias")[e] if module.has_bias else 0)
        if not module.has_gate:
            a = module.act_fn(h)
        else:
            a = module._apply_gate(h)
        y = a @ w2 + (module.down_proj_bias[e] if module.has_bias else 0)
        out = out.index_add(0, token, y * weights[token, k, None])
    return out


def _biased(**more):
    gen = torch.Generator().manual_seed(3)
    biases = torch.randn(3, 48, generator=gen).to(DEVICE), torch.randn(3, 16, generator=gen).to(DEVICE)
    return {"has_bias": True, "gate_up_proj_bias": biases[0], "down_proj_bias": biases[1], **more}


def _transposed(**more):
    plain = view()
    weights = {n: getattr(plain, n).transpose(1, 2).contiguous() for n in ("gate_up_proj", "down_proj")}
    return {"is_transposed": True, **weights, **more}


def relu2(h):
    return torch.relu(h) ** 2


relu2.__name__ = "ReLUSquaredActivation"


def of_gate(gate: Glu) -> dict:
    """A module's own function that `gate` describes, and the numbers where families keep them."""
    return {"_apply_gate": lambda h: gate(h), "limit": gate.limit, "alpha": gate.alpha}


GATES = {
    "clamped": Glu(limit=1.5),
    "clamped late": Glu(limit=0.4, late=True),
    "clamped and scaled": Glu(limit=1.5, alpha=1.7, shift=1.0),
    "scaled": Glu(alpha=1.7),
    "interleaved": Glu(interleaved=True),
    "interleaved, clamped and scaled": Glu(limit=1.5, alpha=1.7, shift=1.0, interleaved=True),
}


KINDS = {
    "plain": {},
    **{f"{name}, in the kernels": of_gate(gate) for name, gate in GATES.items()},
    "clamped, biased, in the kernels": _biased(**of_gate(GATES["clamped and scaled"])),
    "transposed, clamped, interleaved, biased, in the kernels": _transposed(
        **_biased(**of_gate(GATES["interleaved, clamped and scaled"]), is_concatenated=False)
    ),
    "transposed, clamped, biased, in the kernels": _transposed(**_biased(**of_gate(GATES["clamped and scaled"]))),
    "interleaved, biased, in the kernels": _biased(**of_gate(GATES["interleaved"]), is_concatenated=False),
    "transposed": _transposed(),
    "biased": _biased(),
    "not gated": {"has_gate": False, "up_proj": view().gate_up_proj[:, :24].contiguous(), "act_fn": relu2},
}


@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_experts_equals_the_loop_in_output_and_gradients(kind, sentinels):
    """fp32; 1e-5 of the largest value is some 80 roundings."""
    module = view(**KINDS[kind])
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    names += ["gate_up_proj_bias", "down_proj_bias"] if module.has_bias else []
    gen = torch.Generator().manual_seed(1)
    x, dout = torch.randn(23, 16, generator=gen).to(DEVICE), torch.randn(23, 16, generator=gen).to(DEVICE)
    weights, index = (t.to(DEVICE) for t in torch.rand(23, 3, generator=gen).topk(2))
    if sentinels:
        index[::2, 0] = 3
        index[index == 1] = 3  # an expert with no token besides
    results = []
    for function in (scattermoe_experts_forward, eager):
        leaves = [getattr(module, n).detach().requires_grad_() for n in names]
        own = view(**KINDS[kind])
        for name, leaf in zip(names, leaves, strict=True):
            setattr(own, name, leaf)
        if sentinels:
            own.hints = Hints(num_pairs=int((index < 3).sum()))
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = function(own, inputs[0], index, inputs[1])
        results.append([out, *torch.autograd.grad(out, [*inputs, *leaves], dout)])
    for name, a, e in zip(("out", "dx", "dweights", *names), *results, strict=True):
        assert (a - e).abs().max() <= 1e-5 * max(1, e.abs().max()), name


@pytest.mark.parametrize("name", GATES)
def test_a_modules_own_gate_is_recognised_by_what_it_computes(name):
    assert glu_of(view(**of_gate(GATES[name]))) == GATES[name]


def test_a_gate_is_recognised_whatever_the_callers_defaults_are():
    clamped = GATES["interleaved, clamped and scaled"]
    module = view(**of_gate(clamped))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16):
            assert glu_of(module) == clamped
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gate_is_recognised_inside_a_checkpointed_forward_and_leaves_no_trace_there():
    from torch.utils.checkpoint import checkpoint

    module, seen = view(**of_gate(GATES["clamped"])), []

    def layer(x):
        seen.append(glu_of(module))
        return (x * x).sum()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).backward()
    assert seen == [GATES["clamped"]] * 2 and x.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_gate_that_no_description_fits_is_not_guessed():
    far = Glu(limit=100.0)  # under a name that nobody knows
    assert glu_of(view(_apply_gate=lambda h: far(h))) is None
    assert glu_of(view(_apply_gate=lambda h: torch.tanh(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1])) is None
    almost = Glu(limit=1.5)
    assert glu_of(view(_apply_gate=lambda h: almost(h), limit=1.4)) is None
    assert glu_of(view(_apply_gate=lambda h: almost(h.detach()) + 0 * h[..., :24], limit=1.5)) is None


def test_a_limit_that_changes_is_noticed():
    module = view(**of_gate(GATES["clamped"]))
    assert glu_of(module) == Glu(limit=1.5)
    other = Glu(limit=2.5)
    module._apply_gate, module.limit = (lambda h: other(h)), 2.5
    assert glu_of(module) == other


def test_a_gate_of_its_own_compiles_without_a_graph_break():
    module = view(**KINDS["transposed, clamped, interleaved, biased, in the kernels"])
    x, index = torch.randn(7, 16, device=DEVICE), torch.tensor([[0, 1]] * 7, device=DEVICE)
    weights = torch.rand(7, 2, device=DEVICE)
    module.gate_up_proj.requires_grad_(), module.down_proj_bias.requires_grad_()
    leaves = [module.gate_up_proj, module.down_proj_bias]

    def layer(x, weights):
        return scattermoe_experts_forward(module, x, index, weights)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[out, *torch.autograd.grad(out.sum(), leaves)] for out in (compiled(x, weights), layer(x, weights))]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_bias_gradients_carry_the_weight_gradient_scale():
    gradients = []
    for scale in (1.0, 0.25):
        module = view(**_biased(), hints=Hints(weight_grad_scale=scale))
        module.gate_up_proj_bias.requires_grad_(), module.down_proj_bias.requires_grad_()
        biases = [module.gate_up_proj_bias, module.down_proj_bias]
        index = torch.tensor([[0], [1], [2]], device=DEVICE)
        out = scattermoe_experts_forward(
            module, torch.ones(3, 16, device=DEVICE), index, torch.ones(3, 1, device=DEVICE)
        )
        gradients.append(torch.autograd.grad(out.sum(), biases))
    for plain, scaled in zip(*gradients, strict=True):
        assert torch.equal(plain * 0.25, scaled)


def test_gpt_oss_experts_of_transformers_give_their_eager_output():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = modeling.GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=3)
    config._experts_implementation = "eager"
    module = modeling.GptOssExperts(config).to(DEVICE)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert unsupported_reason(module) is None
    x = torch.randn(11, 16, device=DEVICE)
    weights, index = torch.rand(11, 3, device=DEVICE).topk(2)
    expected = module(x, index, weights)
    torch.testing.assert_close(scattermoe_experts_forward(module, x, index, weights), expected, rtol=1e-5, atol=1e-5)


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
