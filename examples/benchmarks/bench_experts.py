"""One MoE experts layer, forward and backward: scattermoe against its alternatives, in one run.

    python examples/benchmarks/bench_experts.py                       # five known layers, bf16
    python examples/benchmarks/bench_experts.py --shape mine=T,K,H,I,E --shape qwen3 --dtype float16

T tokens, K experts per token, H hidden, I intermediate, E experts. Peers: `eager` (the loop over experts) and
`grouped_mm` of transformers always; upstream `scattermoe` (github.com/shawntan/scattermoe) and `sonicmoe` (PyPI
sonic-moe: called as transformers calls it, and as its own top-k layer does) when they import. SonicMoE first measures
its tile sizes for each shape, which takes minutes; QUACK_CACHE_AUTOTUNING=1 keeps them for the next run. Routing is
random with a mild skew: softmax of randn(T, E) + 0.5 * randn(E). Printed per implementation: milliseconds of a forward
and of forward + backward (median of CUDA events), useful TFLOP/s of the latter (18*T*K*H*I), MiB saved for backward
beyond inputs and weights, MiB at the peak, and the relative error (Frobenius norm) of the output and each gradient
against the loop in fp32. Writes a Markdown table and, with matplotlib, a chart, into --out.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from common import kernels_of, median_ms
from torch import Tensor
from transformers.integrations import moe

from accel_moe.kernels import roads
from accel_moe.kernels.scattermoe import scattermoe_experts_forward

SHAPES = {  # T, K, H, I, E
    "mixtral-8x7b": (8192, 2, 4096, 14336, 8),
    "qwen3-30b-a3b": (16384, 8, 2048, 768, 128),
    "olmoe-1b-7b": (16384, 8, 2048, 1024, 64),
    "granite-3b-a800m": (16384, 8, 1536, 512, 40),
    "deepseek-v3-ep8-rank": (8192, 4, 7168, 2048, 32),
}
MIB = 2**20
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, w1, w2, index, weights -> out


@dataclass(frozen=True)
class Result:
    """One implementation on one shape. Errors: out, dx, dw1, dw2, dweights."""

    name: str
    forward_ms: float
    step_ms: float
    tflops: float
    saved_mib: float
    peak_mib: float
    errors: tuple[float, ...]


# ---- The implementations


def _experts_module(w1: Tensor, w2: Tensor) -> SimpleNamespace:
    """The attributes of an experts module that transformers' experts functions read."""

    def apply_gate(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    apply_gate.__name__ = "_default_apply_gate"
    return SimpleNamespace(
        num_experts=w1.shape[0],
        gate_up_proj=w1,
        down_proj=w2,
        act_fn=torch.nn.SiLU(),
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
        _apply_gate=apply_gate,
        config=SimpleNamespace(hidden_act="silu"),
    )


def eager(x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The loop over experts, as transformers' modeling files write it; in fp32 it is the reference."""
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, k = torch.where(index == e)
        gate, up = F.linear(x[token], w1[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[e]) * weights[token, k, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _registered(function) -> Forward:
    return lambda x, w1, w2, index, weights: function(_experts_module(w1, w2), x, index, weights)


def _ours(gluon: bool) -> Forward:
    """On one of the two roads, from this forward on until the next: its backward, too."""

    def forward(*arguments: Tensor) -> Tensor:
        os.environ["SCATTERMOE_GLUON"] = str(int(gluon))
        roads.gluon_road.cache_clear()
        return _registered(scattermoe_experts_forward)(*arguments)

    return forward


def _upstream_scattermoe() -> Forward | None:
    try:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear
    except ImportError:
        return None

    def forward(x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """scattermoe.mlp.GLUMLP.forward on our weights (it keeps the halves the other way round)."""
        experts, slots, offsets = flatten_sort_count(index, num_experts=w1.shape[0])
        k = index.shape[1]
        h = parallel_linear(x, w1.permute(0, 2, 1), k, experts, slots, offsets, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        a = F.silu(gate) * up
        return parallel_linear(
            a, w2.permute(0, 2, 1), 1, experts, slots, offsets, grouped_in=True, gates=weights.to(x.dtype)
        )

    return forward


def _sonicmoe() -> Forward | None:
    """As transformers calls it: it sorts (token, expert) pairs that any routing may have made."""
    try:
        from sonicmoe.enums import ActivationType
        from sonicmoe.functional import moe_general_routing_inputs
    except ImportError:
        return None

    def forward(x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        token = torch.arange(len(x), device=x.device).repeat_interleave(index.shape[1]).int()
        slots = x, weights.reshape(-1).to(x.dtype), token, index.reshape(-1).int()
        out, _ = moe_general_routing_inputs(
            *slots,
            *(w1.permute(1, 2, 0), None, w2.permute(1, 2, 0), None),  # [2I, H, E] and [H, I, E], no biases
            E=len(w1),
            stream_id=None,
            activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,  # gate rows, then up rows
        )
        return out

    return forward


def _sonicmoe_top_k() -> Forward | None:
    """As its own top-k layer calls its functions after the router (0.1.2): each token has exactly K experts."""
    try:
        from sonicmoe import functional
        from sonicmoe.enums import ActivationType
    except ImportError:
        return None

    def forward(x: Tensor, w1: Tensor, w2: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        (T, K), E = index.shape, len(w1)
        counts, offsets, token, scatter, reverse = (
            torch.empty(n, dtype=torch.int32, device=x.device) for n in (E, E + 1, T * K, T * K, T * K)
        )
        functional.TC_topk_router_metadata_triton(index.int(), E, counts, offsets, token, scatter, reverse)
        sorting = token, scatter, reverse, None, False
        infer = not torch.is_grad_enabled()
        a, h = functional._UpProjection.apply(
            *(x, w1.permute(1, 2, 0), None, offsets, T * K, K, *sorting, ActivationType.SWIGLU, infer),
            True,  # gate rows, then up rows
        )
        return functional._DownProjection.apply(
            *(a, h, w2.permute(1, 2, 0), None, weights.float(), offsets, T, K, *sorting, ActivationType.SWIGLU)
        )

    return forward


def implementations(names: list[str] | None) -> dict[str, Forward]:
    """All implementations that can run here, ours first; or only the named ones."""
    found: dict[str, Forward | None] = {
        "scattermoe (ours)": _ours(gluon=False),
        "scattermoe (Gluon)": _ours(gluon=True) if torch.cuda.get_device_capability()[0] == 9 else None,
        "grouped_mm": _registered(moe.grouped_mm_experts_forward),
        "eager": eager,
        "scattermoe upstream": _upstream_scattermoe(),
        "sonicmoe": _sonicmoe(),
        "sonicmoe top-k": _sonicmoe_top_k(),
    }
    return {n: f for n, f in found.items() if f is not None and (names is None or n in names)}


# ---- Measuring


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, routing_dtype: torch.dtype) -> list[Tensor]:
    """x, w1, w2, index, weights and the gradient of the output."""
    T, K, H, I, E = shape
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    x, dout = torch.randn(T, H, **options), torch.randn(T, H, **options)
    w1 = torch.randn(E, 2 * I, H, **options) / H**0.5
    w2 = torch.randn(E, H, I, **options) / I**0.5
    logits = torch.randn(T, E, device="cuda") + 0.5 * torch.randn(E, device="cuda")
    weights, index = logits.softmax(-1).topk(K, dim=-1)
    return [x, w1, w2, index, weights.to(routing_dtype), dout]


def _leaves(inputs: list[Tensor], dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    x, w1, w2, index, weights, dout = inputs
    floats = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, w1, w2, weights)]
    return floats, index, dout.to(dtype or dout.dtype)


def step(forward: Forward, leaves: list[Tensor], index: Tensor, dout: Tensor) -> list[Tensor]:
    """-> out, dx, dw1, dw2, dweights."""
    x, w1, w2, weights = leaves
    out = forward(x, w1, w2, index, weights)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def saved_mib(forward: Forward, leaves: list[Tensor], index: Tensor) -> float:
    """MiB that autograd saves beyond inputs and weights; each storage counts once."""
    inputs = {t.untyped_storage().data_ptr() for t in (*leaves, index)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, w1, w2, weights = leaves
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(x, w1, w2, index, weights)
    del out
    return sum(storages.values()) / MIB


def measure(
    name: str, forward: Forward, shape: tuple[int, ...], inputs: list[Tensor], reference: list[Tensor], repeats: int
) -> Result:
    """One implementation on one shape; `reference` is the result of `step` in fp32."""
    T, K, H, I, _ = shape
    leaves, index, dout = _leaves(inputs)
    x, w1, w2, weights = leaves

    def infer() -> Tensor:
        with torch.no_grad():
            return forward(x, w1, w2, index, weights)

    def train() -> list[Tensor]:
        return step(forward, leaves, index, dout)

    errors = [((a.float() - e).norm() / e.norm()).item() for a, e in zip(train(), reference, strict=True)]
    saved = saved_mib(forward, leaves, index)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    forward_ms, step_ms = median_ms(infer, repeats), median_ms(train, repeats)
    return Result(name, forward_ms, step_ms, 18 * T * K * H * I / step_ms / 1e9, saved, peak, tuple(errors))


def profile(forward: Forward, inputs: list[Tensor]) -> str:
    """One step's kernels, the longest first: milliseconds, launches and name of each."""
    leaves, index, dout = _leaves(inputs)
    step(forward, leaves, index, dout)
    torch.cuda.synchronize()
    kernels = sorted(kernels_of(lambda: step(forward, leaves, index, dout)), key=lambda kernel: -kernel[1])
    total = f"{sum(ms for _, ms, _ in kernels):8.3f} ms of {sum(count for *_, count in kernels)} kernels"
    return "\n".join([total, *(f"{ms:8.3f} ms {count:4d} x {name[:90]}" for name, ms, count in kernels[:24])])


# ---- Reporting


def table(shape_name: str, shape: tuple[int, ...], results: list[Result]) -> str:
    """Markdown; the ratio is grouped_mm's step time over the row's."""
    peer = next((r.step_ms for r in results if r.name == "grouped_mm"), float("nan"))
    lines = [
        f"### {shape_name}: T {shape[0]}, K {shape[1]}, H {shape[2]}, I {shape[3]}, E {shape[4]}",
        "",
        "| | forward ms | fwd + bwd ms | against grouped_mm | TFLOP/s | saved MiB | peak MiB "
        "| error out / dx / dw1 / dw2 / dweights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        errors = " / ".join(f"{e:.1e}" for e in r.errors)
        lines.append(
            f"| {r.name} | {r.forward_ms:.2f} | {r.step_ms:.2f} | {peer / r.step_ms:.2f}x | {r.tflops:.0f} "
            f"| {r.saved_mib:.0f} | {r.peak_mib:.0f} | {errors} |"
        )
    return "\n".join(lines) + "\n"


def chart(all_results: dict[str, list[Result]], path: Path) -> None:
    """Bars of TFLOP/s, forward + backward, of each implementation's quickest turn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no chart")
        return
    names = list(dict.fromkeys(r.name for results in all_results.values() for r in results))
    figure, axes = pyplot.subplots(figsize=(2 + 2 * len(all_results), 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [next((r.tflops for r in rs if r.name == name), 0) for rs in all_results.values()]
        axes.bar([x + i * width for x in range(len(heights))], heights, width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(all_results))], list(all_results))
    axes.set_ylabel("TFLOP/s, forward + backward")
    axes.set_title(f"one experts layer, {torch.cuda.get_device_name()}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(names))  # beside the bars, not on them
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """`qwen3-30b-a3b`, a prefix of a known name, or `name=T,K,H,I,E`."""
    if "=" in text:
        name, numbers = text.split("=")
        shape = tuple(int(n) for n in numbers.split(","))
        if len(shape) == 5:
            return name, shape
    for name, shape in SHAPES.items():
        if name.startswith(text):
            return name, shape
    raise argparse.ArgumentTypeError(f"{text!r} is neither name=T,K,H,I,E nor one of {', '.join(SHAPES)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=parse_shape, help="a known name or name=T,K,H,I,E; repeatable")
    parser.add_argument("--only", action="append", help="an implementation; repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--routing-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--turns", type=int, default=1, help="of all implementations, one after the other")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one step of each")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_experts"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    triton = __import__("triton")
    text = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, transformers "
        f"{__import__('transformers').__version__}; {args.dtype}, routing weights {args.routing_dtype}, "
        f"median of {args.repeats}\n\n"
    )
    print(text, flush=True)
    all_results = {}
    for name, shape in args.shape or SHAPES.items():
        inputs = make_inputs(shape, getattr(torch, args.dtype), getattr(torch, args.routing_dtype))
        reference = step(eager, *_leaves(inputs, torch.float32))
        turns = [
            [
                measure(peer, forward, shape, inputs, reference, 3 if peer == "eager" else args.repeats)
                for peer, forward in implementations(args.only).items()
            ]
            for _ in range(args.turns)
        ]
        all_results[name] = [min(of_one, key=lambda result: result.step_ms) for of_one in zip(*turns)]
        titles = [name] if args.turns == 1 else [f"{name}, turn {turn}" for turn in range(1, args.turns + 1)]
        block = "\n".join(table(title, shape, results) for title, results in zip(titles, turns))
        if args.profile:
            for peer, forward in implementations(args.only).items():
                if peer != "eager":
                    block += f"\n{peer}, one step of {name}:\n\n```\n{profile(forward, inputs)}\n```\n"
        del inputs, reference
        torch.cuda.empty_cache()
        print(block, flush=True)
        text += block + "\n"
    (args.out / "experts.md").write_text(text)
    chart(all_results, args.out / "experts.png")


if __name__ == "__main__":
    main()
