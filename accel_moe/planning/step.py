"""A step's time under expert parallelism on paper, term by term: milliseconds of one GPU, and of its host.

Nothing is measured here. `MEASURED` holds rates that benchmarks measured on H100s (examples/benchmarks/RESULTS.md), all
with Qwen3-30B-A3B shapes. `LINKS` holds the nominal bandwidth of a DGX H100's links, and the share of it that
collectives usually reach. The rest is counting. examples/benchmarks/SCALING.md checks the model against runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

GB = 1e9


@dataclass(frozen=True)
class Model:
    """What a step's time depends on in a decoder with experts.

    Attributes:
        attention: heads x head size.
        dense: parameters of the layers without the experts.
        routed: parameters of the experts, all of them.
        embeddings: parameters of the embeddings, in and out.
        trained: parameters that the optimizer updates; None is all of them. If fewer, no gradient of a frozen weight is
            computed.
    """

    layers: int
    moe_layers: int
    hidden: int
    vocabulary: int
    attention: int
    experts: int
    top_k: int
    dense: int
    routed: int
    embeddings: int
    trained: int | None = None

    @property
    def parameters(self) -> int:
        return self.dense + self.routed + self.embeddings

    @property
    def routed_per_token(self) -> float:
        return self.routed * self.top_k / self.experts


@dataclass(frozen=True)
class Job:
    """How a model is trained: GPUs cut into replicas x efsdp x ep, sequences of `length`, `tokens` a GPU and step."""

    model: Model
    ep: int
    efsdp: int = 1
    replicas: int = 1
    per_node: int = 8
    tokens: int = 8192
    length: int = 4096
    checkpointing: bool = False
    bf16_weights: bool = False
    """And gradients and moments; else they are fp32."""
    compiled: bool = False
    exchange_again: bool = False
    """In the forward that checkpointing runs again."""
    expert_bytes: float = 2
    """That FSDP gathers of an expert's weight: 2 is bf16."""

    @property
    def gpus(self) -> int:
        return self.ep * self.efsdp * self.replicas


MEASURED = {
    "expert GEMMs, FLOP/s": 445e12,  # bench_experts.py, qwen3-30b-a3b, forward + backward
    "dense GEMMs, FLOP/s": 600e12,  # 27 ms of the 6-layer step
    "attention, FLOP/s": 330e12,  # 17 ms of the 6-layer step
    "AdamW, bytes/s": 2.5e12,  # 24 ms for 2.2 G parameters of 28 bytes: read and write p, m, v, read g
    "cross entropy, bytes/s": 1.4e12,  # 14 ms over fp32 logits of 8192 x 151936, read or written four times
    "elementwise, bytes/s": 2.2e12,
}
LINKS = {"NVLink": 450 * GB * 0.7, "InfiniBand": 50 * GB * 0.8}  # a GPU, one direction: DGX H100, NDR 400 Gb/s
ELEMENTWISE_PASSES, COMPILED_PASSES = 330, 60
"""Over [tokens, hidden] in bf16, forward + backward, a layer: norms, rope, residuals, casts. In eager transformers as
the profiles of 6 and of 48 layers have it (5 ms a layer), and as counted where each is done once, which is what
torch.compile comes near."""
HOST_MS_PER_LAYER, COMPILED_HOST_MS_PER_LAYER = 18.0, 12.0
"""What the host needs to launch one decoder layer's forward and backward, transformers under FSDP2 and our dispatch, on
the virtual machines of the measurements: no step is shorter than that for all layers. Eager it was 15 (6 layers, 2048
tokens) to 22 (48 layers), compiled no more than 12.6."""


def ranks_hit(experts: int, top_k: int, ep: int) -> float:
    """Expected number of ranks that a token goes to, under even routing; each rank counts once."""
    others = experts - experts // ep
    return ep * (1 - comb(others, top_k) / comb(experts, top_k))


def terms_ms(job: Job) -> dict[str, float]:
    """Milliseconds of each term of a step on one GPU, without overlap."""
    m, t = job.model, job.tokens
    runs = 4 if job.checkpointing else 3  # forward, backward twice its work, and the forward again
    frozen = m.trained is not None
    products = runs - frozen  # frozen weights have no gradient
    ms: dict[str, float] = {}
    flops = products * 2 * t * m.dense + (3 - frozen) * 2 * t * m.vocabulary * m.hidden
    ms["dense GEMMs"] = flops / MEASURED["dense GEMMs, FLOP/s"] * 1e3
    scores = 2 * 2 * t * job.length * m.attention / 2  # causal: half of them
    ms["attention"] = (runs + 0.5) * m.layers * scores / MEASURED["attention, FLOP/s"] * 1e3
    flops = products * 2 * t * m.routed_per_token
    ms["expert GEMMs"] = flops / MEASURED["expert GEMMs, FLOP/s"] * 1e3
    passes = COMPILED_PASSES if job.compiled else ELEMENTWISE_PASSES
    ms["elementwise"] = runs / 3 * m.layers * passes * t * m.hidden * 2 / MEASURED["elementwise, bytes/s"] * 1e3
    ms["cross entropy"] = 4 * t * m.vocabulary * 4 / MEASURED["cross entropy, bytes/s"] * 1e3
    own = (m.parameters if m.trained is None else m.trained) / (job.ep * job.efsdp)
    ms["AdamW"] = (14 if job.bf16_weights else 28) * own / MEASURED["AdamW, bytes/s"] * 1e3
    # fp32 weights to bf16, in forward and again in backward, of the experts that a rank computes with
    cast_bytes = 0 if job.bf16_weights else 6
    ms["expert casts"] = 2 * cast_bytes * m.routed / job.ep / MEASURED["elementwise, bytes/s"] * 1e3
    ms["exchange"] = exchange_ms(job)
    ms["dense FSDP"] = fsdp_ms(job, m.dense + m.embeddings, job.ep * job.efsdp, stride=1)
    ms["expert FSDP"] = fsdp_ms(job, m.routed / job.ep, job.efsdp, stride=job.ep, each=job.expert_bytes)
    return ms


def exchange_ms(job: Job) -> float:
    """Four exchanges of rows a layer (dispatch and combine, forward and backward), each row once per rank.
    Checkpointing keeps the received rows and adds no exchange, unless `exchange_again`."""
    m = job.model
    hit = ranks_hit(m.experts, m.top_k, job.ep) / job.ep  # the share of tokens that a given rank gets
    on_node = min(job.ep, job.per_node) - 1
    off_node = job.ep - 1 - on_node
    row_bytes = (6 if job.exchange_again else 4) * m.moe_layers * job.tokens * hit * m.hidden * 2
    return (on_node * row_bytes / LINKS["NVLink"] + off_node * row_bytes / LINKS["InfiniBand"]) * 1e3


def fsdp_ms(job: Job, parameters: float, group: int, *, stride: int, each: float = 2) -> float:
    """All-gather in bf16 for forward and for backward, reduce-scatter in fp32 (or bf16), and the replicas' all-reduce.
    Of frozen weights only the all-gathers.

    Args:
        group: how many ranks share the parameters, every `stride`-th rank of the job.
        each: bytes of a gathered parameter.
    """
    across = group * stride > job.per_node
    link = LINKS["InfiniBand"] if across else LINKS["NVLink"]
    # a ring over nodes: one GPU of each node passes on what all of the node need, those in the group share the work
    wires = max(1, job.per_node // stride) if across else 1
    gradient_bytes = 0 if job.model.trained is not None else 2 if job.bf16_weights else 4
    moved = parameters * (2 * each + gradient_bytes)
    # with several wires also inside the node over NVLink, which is not what takes the time
    moved = moved / wires if wires > 1 else moved * (group - 1) / group
    reduced = 2 * gradient_bytes * parameters / group * (job.replicas - 1) / job.replicas
    between = LINKS["NVLink"] if job.gpus <= job.per_node else LINKS["InfiniBand"]
    return (moved / link + reduced / between) * 1e3


def host_ms(job: Job) -> float:
    """Milliseconds that the host needs to launch a step, including checkpointing's second forward."""
    per_layer = COMPILED_HOST_MS_PER_LAYER if job.compiled else HOST_MS_PER_LAYER
    return job.model.layers * per_layer * (4 / 3 if job.checkpointing else 1)


def step_ms(terms: dict[str, float]) -> tuple[float, float]:
    """Milliseconds of the GPU: (without any overlap, with all of FSDP hidden behind compute)."""
    communication = terms["dense FSDP"] + terms["expert FSDP"]
    rest = sum(terms.values()) - communication
    return rest + communication, max(rest, communication)
