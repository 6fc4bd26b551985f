"""Dispatch and combine without experts: bytes sent, and the bandwidth against a plain all_to_all of as many bytes.

    torchrun --nproc_per_node 2 examples/benchmarks/bench_dispatch.py
    torchrun --nproc_per_node 8 examples/benchmarks/bench_dispatch.py --tokens 4096 --results RESULTS.md

One layer's exchange, forward and backward, in bf16, with random routing of mild skew. There are no experts: each row
comes back unchanged. Reported per rank, medians over --repeats of the slowest rank:

- bytes sent to other ranks in all exchanges, counted at the calls of torch.distributed, against the textbook's one row
  per (token, expert);
- bus bandwidth: those bytes over the time of dispatch + combine, forward + backward, with packing, unpacking and the
  host sync, against `all_to_all_single` of the same bytes. It is measured twice. *alone* starts from an idle GPU, so
  the host cannot launch as fast as the links deliver. *in a layer* is the time that the exchange adds to a GPU with
  other work: a millisecond of matrix products each for the weight casts, the experts (forward and backward) and the
  next layer.

On a machine without a GPU it runs on gloo, to try the script out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import replace_section

from accel_moe.dispatch import DISPATCHERS, all_gather, all_to_all, make_dispatcher
from accel_moe.dispatch.base import NO_OVERLAP, Overlap, RoutedTokens

GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each rank (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dispatcher", default="auto", choices=DISPATCHERS, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--results", type=Path, metavar="MARKDOWN", help="file to write the section into")
    args = parser.parse_args()

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if GPU else torch.device("cpu")
    if GPU:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPU else "gloo")
    lines = measure(args, device)
    if dist.get_rank() == 0:
        command = f"torchrun --nproc_per_node {dist.get_world_size()} {os.path.relpath(__file__)}"
        section = report(lines, " ".join([command, *sys.argv[1:]]), args)
        print(section)
        if args.results:
            replace_section(args.results, "bench_dispatch", "Dispatch and combine", section)
    dist.destroy_process_group()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    skew = 0.5 * torch.randn(args.experts, generator=torch.Generator().manual_seed(99))
    scores = torch.randn(args.tokens, args.experts, generator=generator) + skew
    weights, index = scores.softmax(-1).topk(args.top_k)
    weights, index = weights.to(device, torch.bfloat16).requires_grad_(), index.to(device)
    hidden = torch.randn(args.tokens, args.hidden_size, generator=generator).to(device, torch.bfloat16).requires_grad_()
    upstream = torch.randn_like(hidden)
    dispatcher = make_dispatcher(args.dispatcher, dist.group.WORLD, args.experts)

    square = torch.randn(4096 if GPU else 64, 4096 if GPU else 64, device=device, dtype=torch.bfloat16)

    works = 0

    def work() -> None:
        nonlocal works
        works += 1
        for _ in range(5):
            torch.mm(square, square)

    class Experts(torch.autograd.Function):
        """Returns each row unchanged; runs the GEMMs that a layer would run, forward and backward."""

        @staticmethod
        def forward(ctx, rows, weights, ready, in_layer: bool):
            ctx.ready, ctx.in_layer = ready, in_layer
            ctx.save_for_backward(weights)
            if in_layer:
                work()
            return rows.view_as(rows)

        @staticmethod
        def backward(ctx, gradient):
            # the weights have a gradient of their own, which travels too
            gradient, grad_weights = gradient.contiguous(), ctx.saved_tensors[0].clone()
            if ctx.in_layer:
                work()
            if ctx.ready is not None:
                ctx.ready(gradient, grad_weights)
            if ctx.in_layer:
                work()  # the weight gradients
            return gradient, grad_weights, None, None

    class InLayer(Overlap):
        def prepare_weights(self) -> None:
            work()

        def for_backward(self):
            return work

    def one_pass(in_layer: bool = False) -> None:
        overlap = InLayer() if in_layer else NO_OVERLAP
        sent = dispatcher.dispatch(RoutedTokens(hidden, index, weights), overlap)
        rows = Experts.apply(sent.rows, sent.local_weights, sent.on_input_grads, in_layer)
        out = dispatcher.combine(rows, sent, overlap)
        if in_layer:
            work()  # the layer's next operations
        torch.autograd.grad(out, (hidden, weights), upstream)

    exchanges = recorded(one_pass)
    sent_bytes = sum(sum(give) - give[rank] for give, _ in exchanges)
    naive_bytes = 4 * float((index // (args.experts // world) != rank).sum()) * args.hidden_size * 2
    empty = functools.partial(torch.empty, dtype=torch.uint8, device=device)
    buffers = [(empty(sum(give)), empty(sum(take)), give, take) for give, take in exchanges]

    def plain() -> None:
        for sent, received, give, take in buffers:
            dist.all_to_all_single(received, sent, output_split_sizes=take, input_split_sizes=give)

    one_pass(in_layer=True)
    in_a_layer = works

    def only_work() -> None:
        for _ in range(in_a_layer):
            work()

    alone = {"plain_s": median_s(plain, args.repeats), "ours_s": median_s(one_pass, args.repeats)}
    base_s = median_s(only_work, args.repeats)
    in_layer = {
        "plain_s": median_s(lambda: (only_work(), plain()), args.repeats) - base_s,
        "ours_s": median_s(lambda: one_pass(in_layer=True), args.repeats) - base_s,
    }
    return {"sent": sent_bytes, "naive": naive_bytes, "alone": alone, "in a layer": in_layer}


def recorded(step: Callable[[], None]) -> list[tuple[list[int], list[int]]]:
    """(bytes to, bytes from) each rank, of every exchange of rows in `step`."""
    seen = []

    def of_rows(rows, received, send_counts, receive_counts, group):
        width = rows[0:1].numel() * rows.element_size() if len(rows) else 0
        seen.append(([count * width for count in send_counts], [count * width for count in receive_counts]))

    def of_all(rows, nbytes: int, group):
        others = [0 if rank == dist.get_rank(group) else nbytes for rank in range(dist.get_world_size(group))]
        seen.append((others, others))

    watched = [
        (all_to_all, "exchange_rows", of_rows),
        (all_gather, "gather_rows", lambda own, gathered, group: of_all(own, own.nbytes, group)),
        (all_gather, "sum_rows", lambda rows, group: of_all(rows, rows.nbytes // dist.get_world_size(group), group)),
    ]
    with contextlib.ExitStack() as patches:
        for module, name, watch in watched:
            real = getattr(module, name)
            both = lambda *args, real=real, watch=watch: (watch(*args), real(*args))[1]  # noqa: E731
            patches.enter_context(mock.patch.object(module, name, both))
        step()
    return seen


def median_s(step: Callable[[], None], repeats: int) -> float:
    """The median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats + 3):
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times[3:], dtype=torch.double, device="cuda" if GPU else "cpu")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def report(found: dict[str, Any], command: str, args: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if GPU else "CPU, gloo"
    head = "dispatcher | ranks | tokens | H | E | K | MiB sent | / row per expert | | ms | plain ms | GB/s | plain GB/s"
    table = [f"| {head} | ratio |", "|" + "---|" * 14]
    for where in ("alone", "in a layer"):
        times = found[where]
        ours, plain = (found["sent"] / times[name] / 1e9 for name in ("ours_s", "plain_s"))
        cells = [
            args.dispatcher, f"{dist.get_world_size()}", f"{args.tokens}", f"{args.hidden_size}", f"{args.experts}",
            f"{args.top_k}", f"{found['sent'] / 2**20:.1f}", f"{found['sent'] / found['naive']:.3f}", where,
            f"{times['ours_s'] * 1e3:.2f}", f"{times['plain_s'] * 1e3:.2f}",
            f"{ours:.0f}", f"{plain:.0f}", f"{ours / plain:.2f}",
        ]  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"`{command}`", "", f"{device}; torch {torch.__version__}. bf16, one layer.", "", *table])


if __name__ == "__main__":
    main()
