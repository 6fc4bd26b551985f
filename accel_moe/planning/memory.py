"""The memory of one rank, by kind and at its peak, in bytes.

    exact           weights, gradients and AdamW's moments: parameters counted on meta, cut evenly over the ranks (FSDP
                    rounds rows of dim 0 up, which is left out)
    counted         activations: what autograd keeps of one forward, traced on meta (trace.py), and our experts' part
    estimated       the loss, FSDP's gathered layers, the exchange's buffers: from their sizes in the code, at the
                    moments of a step that may hold most

A step holds most at one of four moments:

    loss            weights, moments, all activations, the softmax of the logits and its gradient, the gathered head
    layer, forward  weights, moments, all activations, one layer's working memory
    layer, backward weights, moments, nearly all gradients, one layer's working memory and activations
    embedding       weights, moments, all gradients, and the embedding's gradient before it is reduced

Peaks are those of torch's allocator. tests/unit/test_plan.py compares them with every measured run of
examples/benchmarks/RESULTS.md. The terms were written with the same runs in view: the comparison guards them, and is no
test on unseen runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel_moe.mesh import MeshPlan
from accel_moe.planning import step
from accel_moe.planning.shapes import Shapes

GIB = 2**30
BF16, FP32 = 2, 4
MARGIN_OF_LIKELY = 1.125
"""As kernels/deferred_count.py: the pre-activations that an all-gather keeps, of an even routing's."""
COMPILED_SHARE = 0.56
"""Of the activations outside the experts, what a compiled layer keeps: 11 of 19.7 times [tokens, hidden] in bf16.
Fitted to the peaks of Qwen3-30B-A3B at 6 and at 48 layers."""
LOSS_COPIES = 3
"""fp32 tensors [tokens, vocabulary] at the peak of transformers' loss. From the measured 13.9 GiB of 8192 x 151936
(RESULTS.md, Limits of a step), which are three; which three was not looked up in a memory profile."""
OF_MEMORY = 1 / 16
"""As dispatch/automatic.py: the share of a GPU that an all-gather's buffers may take."""
NEEDED = 0.75
"""As dispatch/automatic.py: the share of rows that an even routing must need for an all-gather."""
RING_COPIES = 3
"""fp32 tensors [tokens, attention] that torch's ring attention adds up partial results in. Read in its code (the sum,
the part, the new sum), and not measured."""
INFINITE = float("inf")


@dataclass(frozen=True)
class Training:
    """What a run is asked to do, on each GPU.

    Attributes:
        sequences, length: the batch of cp GPUs that share it; of one GPU at cp 1.
        cp: GPUs that share each sequence.
        saved_bytes: kept for backward outside the experts, of all layers: trace.Traced.
        lora, lora_experts: the rank of adapters on attention, and whether the experts have some; 0 trains all weights.
        base_bytes: of a frozen weight of the base.
        bf16_weights: weights, gradients and moments in bf16, without a master copy.
    """

    saved_bytes: int
    sequences: int = 1
    length: int = 4096
    cp: int = 1
    memory_bytes: float = 80 * GIB
    gpus_per_node: int = 8
    lora: int = 0
    lora_experts: bool = False
    quantize: str = "none"
    base_bytes: int = BF16
    checkpointing: bool = False
    bf16_weights: bool = False
    recompute_up: bool = False
    compiled: bool = False
    keep_exchanged: bool = True

    @property
    def tokens(self) -> int:
        """Of a GPU and step."""
        return self.sequences * self.length // self.cp


@dataclass(frozen=True)
class Use:
    """Bytes of one rank. The first four kinds stay for the step or most of it; the others come and go.

    Attributes:
        activations: kept for backward at the end of the forward, under even routing.
        layer: FSDP's gathered weights and unreduced gradients, casts, and activations that checkpointing makes again.
        exchange: rows and pairs of one layer, under even routing, at twice that on this rank, and at worst: every token
            of the ep group goes to experts of this rank, in every layer.
        peak: for the same three.
        at: the moment of the first peak.
        all_gather: the dispatcher that `moe_dispatcher: auto` takes; else all_to_all. None at ep 1.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    layer: float
    loss: float
    exchange: tuple[float, float, float]
    peak: tuple[float, float, float]
    at: str
    all_gather: bool | None


@dataclass(frozen=True)
class Rows:
    """What one layer's exchange brings to a rank.

    Attributes:
        received: R, rows.
        pairs: P, (row, expert) pairs.
        room: pairs that buffers in forward have room for.
        kept: rows of the pre-activation that are kept for backward.
    """

    received: float
    pairs: float
    room: float
    kept: float


def use_of(shapes: Shapes, run: Training, mesh: MeshPlan) -> Use:
    """The memory of the rank of `mesh` that the routing loads most."""
    weights, gradients, optimizer = _persistent(shapes, run, mesh.fsdp_ranks)
    all_gather = takes_all_gather(shapes, run, mesh.ep)
    results = []
    for imbalance in (1.0, 2.0, INFINITE):
        rows = _rows(shapes, run, mesh.ep, imbalance, all_gather)
        results.append((_activations(shapes, run, mesh.ep, rows), *_exchange(shapes, run, rows), rows))
    loss = LOSS_COPIES * FP32 * run.tokens * shapes.vocabulary
    head = BF16 * (shapes.head or shapes.embedding) if mesh.world_size > 1 or _trained_bytes(run) != BF16 else 0
    # the gradient, the input of its reduce-scatter and its output: these explain the measured peak at 1 x 2048 tokens
    embedding = 0 if run.lora else (2 + 1 / mesh.fsdp_ranks) * BF16 * shapes.embedding
    ring = RING_COPIES * FP32 * run.tokens * shapes.attention if run.cp > 1 else 0
    peaks = []
    for kept, forward, backward, rows in results:
        made_again = _made_again(shapes, run, rows)
        moments = {
            "loss": kept + loss + head,
            "layer, forward": kept + max(forward, ring) + _gathered(shapes, run, mesh, backward=False),
            "layer, backward": gradients
            + kept / shapes.layers
            + made_again
            + max(backward, ring)
            + _gathered(shapes, run, mesh, backward=True),
            "embedding": gradients + embedding,
            "last layer, backward": kept + made_again + backward + _gathered(shapes, run, mesh, backward=True) + head,
        }
        at = max(moments, key=lambda name: moments[name])
        peaks.append((weights + optimizer + moments[at], at))
    return Use(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=results[0][0],
        layer=_gathered(shapes, run, mesh, backward=True) + _made_again(shapes, run, results[0][-1]),
        loss=loss,
        exchange=tuple(max(forward, backward) for _, forward, backward, _ in results),  # pyright: ignore
        peak=tuple(peak for peak, _ in peaks),  # pyright: ignore
        at=peaks[0][1],
        all_gather=all_gather,
    )


def _trained_bytes(run: Training) -> int:
    return BF16 if run.bf16_weights else FP32


def _persistent(shapes: Shapes, run: Training, fsdp_ranks: int) -> tuple[float, float, float]:
    """Weights, gradients and moments. FSDP reduces gradients in bf16 and keeps them in the weights' dtype."""
    each = _trained_bytes(run)
    if not run.lora:
        own = shapes.parameters / fsdp_ranks
        return each * own, each * own, 2 * each * own
    frozen = run.base_bytes * (shapes.parameters - shapes.routed)
    frozen += run.base_bytes * shapes.routed if run.quantize == "none" else shapes.packed_bytes(run.quantize)
    adapters = shapes.adapters(run.lora, run.lora_experts) / fsdp_ranks
    return frozen / fsdp_ranks + FP32 * adapters, FP32 * adapters, 2 * FP32 * adapters


def takes_all_gather(shapes: Shapes, run: Training, ep: int) -> bool | None:
    """The choice of dispatch/automatic.py; None at ep 1, where nothing is exchanged."""
    if ep == 1:
        return None
    row_bytes, pair_bytes = BF16 * shapes.hidden, BF16 * (shapes.width + shapes.inner)
    most = ep * run.tokens * (row_bytes + shapes.top_k * (pair_bytes + row_bytes))
    needed = 1 - (1 - 1 / ep) ** shapes.top_k
    return ep <= run.gpus_per_node and needed >= NEEDED and most <= OF_MEMORY * run.memory_bytes


def _rows(shapes: Shapes, run: Training, ep: int, imbalance: float, all_gather: bool | None) -> Rows:
    even = run.tokens * shapes.top_k
    if ep == 1:
        return Rows(0, even, even, even)
    everything = ep * run.tokens
    pairs = min(imbalance * even, everything * min(shapes.top_k, shapes.experts // ep))
    if all_gather:
        most = everything * shapes.top_k
        return Rows(everything, pairs, most, min(most, MARGIN_OF_LIKELY * even))
    hit = run.tokens * step.ranks_hit(shapes.experts, shapes.top_k, ep)
    return Rows(min(everything, imbalance * hit), pairs, pairs, pairs)


def _routing_bytes(shapes: Shapes, rows: Rows) -> float:
    """Indices, weights and the sort of the pairs, in 4 bytes each."""
    return 4 * shapes.top_k * 3 * rows.received + 4 * rows.kept


def _layer_keeps(shapes: Shapes, run: Training, rows: Rows) -> float:
    """By one experts layer, for its backward: the pre-activation, the received rows, LoRA's narrow rows."""
    kept = 0 if run.recompute_up else rows.kept * shapes.width * BF16
    narrow = 2 * run.lora * rows.kept * BF16 if run.lora_experts else 0
    return kept + narrow + rows.received * shapes.hidden * BF16 + _routing_bytes(shapes, rows)


def _outside(run: Training) -> float:
    return run.saved_bytes * (COMPILED_SHARE if run.compiled else 1)


def _activations(shapes: Shapes, run: Training, ep: int, rows: Rows) -> float:
    if not run.checkpointing:
        return _outside(run) + shapes.moe_layers * _layer_keeps(shapes, run, rows)
    keeps = ep > 1 and run.keep_exchanged
    exchanged = (rows.received + run.tokens) * shapes.hidden * BF16 + _routing_bytes(shapes, rows) if keeps else 0
    return shapes.layers * run.tokens * shapes.hidden * BF16 + shapes.moe_layers * exchanged


def _made_again(shapes: Shapes, run: Training, rows: Rows) -> float:
    """One layer's activations under checkpointing, in its backward."""
    if not run.checkpointing:
        return 0
    return _outside(run) / shapes.layers + _layer_keeps(shapes, run, rows)


def _exchange(shapes: Shapes, run: Training, rows: Rows) -> tuple[float, float]:
    """Rows and pairs of one layer in forward and in backward, besides what is kept."""
    row, inner, width = (BF16 * size for size in (shapes.hidden, shapes.inner, shapes.width))
    sums = (rows.received + run.tokens) * row  # of the rows, and of the tokens after the combine
    forward = rows.room * (inner + row) + sums
    # gradients of pairs: dh and the activation, the padded rows of dout, and those that are summed up to dx
    backward = rows.pairs * (width + inner + 2 * row) + 2 * sums
    if run.recompute_up or rows.pairs > rows.kept:
        backward += rows.pairs * width
    return forward, backward


def _gathered(shapes: Shapes, run: Training, mesh: MeshPlan, *, backward: bool) -> float:
    """FSDP's weights of one layer in use and one that is prefetched, unreduced gradients, and casts of experts."""
    dense, experts = BF16 * shapes.dense_layer, BF16 * shapes.routed_layer / mesh.ep
    learns = backward and not run.lora
    copies = 2 + (2 if learns else 0)  # a gradient, and the input of its reduce-scatter
    alone = mesh.efsdp == mesh.dp_replicate == 1
    if run.quantize != "none":  # made dense, one layer at a time
        packed = shapes.packed_bytes(run.quantize) / shapes.moe_layers / mesh.ep
        return copies * dense + experts + (0 if alone else 2 * packed)
    if alone:
        is_cast = (run.base_bytes if run.lora else _trained_bytes(run)) != BF16
        return copies * dense + (experts if is_cast else 0)
    return copies * (dense + experts)
