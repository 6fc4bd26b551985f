"""Experts layers with uncommon maths, as transformers defines them: scattermoe against grouped_mm.

    python examples/benchmarks/bench_families.py                      # on a GPU, bf16, 8192 tokens
    TRITON_INTERPRET=1 python examples/benchmarks/bench_families.py --tokens 16 --shrink 16     # on a CPU, to try it

The modules are transformers' own classes at the published models' sizes, with random weights (DeepSeek-V4 with a
quarter of its experts: a rank's share at ep 4). Routing is random with a mild skew. Printed for each function:
milliseconds of a forward and of forward + backward (medians of CUDA events), the ratio to grouped_mm, and the relative
error (Frobenius norm) of the output and of every gradient against the module's own loop over experts in fp32.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import median_ms, replace_section
from torch import Tensor, nn
from transformers.integrations import moe

from accel_moe.catalogue import build_experts
from accel_moe.kernels.glu import glu_of
from accel_moe.kernels.scattermoe import scattermoe_experts_forward

FAMILIES = {  # module and class, config class, its sizes, K
    "qwen3_moe": (
        "Qwen3MoeExperts",
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128},
        8,
    ),
    "gpt_oss": (
        "GptOssExperts",
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32},
        4,
    ),
    "nemotron_h": (
        "NemotronHExperts",
        "NemotronHConfig",
        {"hidden_size": 2688, "moe_intermediate_size": 1856, "n_routed_experts": 128},
        6,
    ),
    "deepseek_v4": (
        "DeepseekV4Experts",
        "DeepseekV4Config",
        {"hidden_size": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 64},
        6,
    ),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "scattermoe (ours)": scattermoe_experts_forward,
    "grouped_mm": moe.grouped_mm_experts_forward,
}
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--shrink", type=int, default=1, help="divides every size, to try the script out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--results", type=Path, metavar="MARKDOWN", help="file to write the section into")
    args = parser.parse_args()
    blocks = [block(family, args) for family in args.only]
    device = torch.cuda.get_device_name() if GPU else "CPU, Triton's interpreter"
    versions = f"torch {torch.__version__}, transformers {__import__('transformers').__version__}"
    command = f"python {os.path.relpath(__file__)} {' '.join(sys.argv[1:])}".rstrip()
    section = "\n".join([f"`{command}`", "", f"{device}; {versions}.", "", *blocks])
    print(section)
    if args.results:
        replace_section(args.results, "bench_families", "Families", section)


def block(family: str, args: argparse.Namespace) -> str:
    """One family's table."""
    module, top_k = build(family, args.shrink)
    hidden = module.down_proj.shape[2 if module.is_transposed else 1]
    dtype = torch.bfloat16 if GPU else torch.float32  # bf16 products are wrong in Triton's interpreter
    generator = torch.Generator(DEVICE).manual_seed(1)
    random = {"generator": generator, "device": DEVICE}
    x, dout = (torch.randn(args.tokens, hidden, **random).to(dtype) for _ in range(2))
    scores = torch.randn(args.tokens, module.num_experts, **random) + 0.5 * torch.randn(module.num_experts, **random)
    weights, index = scores.softmax(-1).topk(min(top_k, module.num_experts))
    own_loop = inspect.unwrap(type(module).forward)
    reference = step(own_loop, copy.deepcopy(module).float(), x.float(), index, weights, dout.float())
    reference = [t.to(dtype) for t in reference]
    torch.cuda.empty_cache() if GPU else None
    module.to(dtype)
    names = [name for name, _ in module.named_parameters()]
    gate = glu_of(module)
    lines = [
        f"### {family}: T {args.tokens}, K {index.shape[1]}, H {hidden}, E {module.num_experts}; "
        f"{gate.describe() if gate else 'its own gate'}{', biases' if module.has_bias else ''}",
        "",
        f"| | forward ms | fwd + bwd ms | against grouped_mm | error out / dx / dweights / {' / '.join(names)} |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for name, function in FUNCTIONS.items():
        found = step(function, module, x, index, weights, dout)
        errors = [((f.float() - r.float()).norm() / r.float().norm()).item() for f, r in zip(found, reference)]
        del found

        def infer(function=function):
            with torch.no_grad():
                function(module, x, index, weights)

        forward_ms = median_ms(infer, args.repeats)
        step_ms = median_ms(lambda f=function: step(f, module, x, index, weights, dout), args.repeats)
        rows.append((name, forward_ms, step_ms, " / ".join(f"{e:.1e}" for e in errors)))
    peer = rows[-1][2]
    lines += [f"| {name} | {f:.2f} | {s:.2f} | {peer / s:.2f}x | {errors} |" for name, f, s, errors in rows]
    return "\n".join(lines) + "\n"


def build(family: str, shrink: int) -> tuple[nn.Module, int]:
    """(the family's experts module in fp32 with random weights, K)."""
    import transformers

    class_name, config_name, sizes, top_k = FAMILIES[family]
    config = getattr(transformers, config_name)(**{name: max(4, size // shrink) for name, size in sizes.items()})
    with torch.device(DEVICE):
        module = build_experts(f"transformers.models.{family}.modeling_{family}", class_name, [config])
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
            if parameter.dim() == 3:
                parameter /= parameter.shape[1 if module.is_transposed else 2] ** 0.5
    return module, top_k


def step(function: Callable[..., Tensor], module: nn.Module, x, index, weights, dout) -> list[Tensor]:
    """-> out, dx, dweights and the parameters' gradients."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = function(module, x, index, weights)
    gradients = torch.autograd.grad(out, [x, weights, *module.parameters()], dout.to(out.dtype))
    return [out.detach(), *gradients]


if __name__ == "__main__":
    main()
