"""A step's time under expert parallelism on paper, term by term: milliseconds of one GPU, and of its host.

Nothing is measured here. `H100` and `H200` hold rates that benchmarks measured (examples/benchmarks/RESULTS.md), all
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
class Rates:
    """What a GPU reached in a training step's profile: FLOP/s of products, bytes/s of the rest."""

    name: str
    expert_gemms: float
    dense_gemms: float
    attention: float
    adamw: float
    """Of 28 bytes a parameter: read and write p, m, v, read g."""
    cross_entropy: float
    """Of fp32 logits, read or written four times; their casts are in the time."""
    elementwise: float
    casts: float
    """fp32 weights to bf16."""


# of the 6-layer step at 2 x 4096: 22, 27, 11.3, 24, 21, 30 and 8 ms on H100, transformers 5.23
H100 = Rates("H100", 506e12, 775e12, 510e12, 2.5e12, 0.95e12, 2.2e12, 2.7e12)
# 21, 27, 11.3, 18, 18, 30 and 5.4 ms on H200, transformers 5.24
H200 = Rates("H200", 530e12, 775e12, 510e12, 3.4e12, 1.1e12, 2.2e12, 4.0e12)


def rates_of(memory_bytes: float) -> Rates:
    """Those of the measured card that is nearest by its memory."""
    return H200 if memory_bytes > 100 * 2**30 else H100


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
    rates: Rates = H100

    @property
    def gpus(self) -> int:
        return self.ep * self.efsdp * self.replicas


LINKS = {"NVLink": 450 * GB * 0.7, "InfiniBand": 50 * GB * 0.8}  # a GPU, one direction: DGX H100, NDR 400 Gb/s
ELEMENTWISE_PASSES, COMPILED_PASSES = 330, 60
"""Over [tokens, hidden] in bf16, forward + backward, a layer: norms, rope, residuals, casts. In eager transformers as
the profiles of 6 and of 48 layers have it (5 ms a layer), and as counted where each is done once, which is what
torch.compile comes near."""
HOST_MS_PER_LAYER, COMPILED_HOST_MS_PER_LAYER = 11.0, 10.5
"""What the host needs to launch one decoder layer's forward and backward, transformers under FSDP2 and our dispatch, on
the virtual machines of the measurements: no step is shorter than that for all layers. Six layers of 2048 tokens took 67
ms eagerly and 64 to 67 compiled."""


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
    ms["dense GEMMs"] = flops / job.rates.dense_gemms * 1e3
    scores = 2 * 2 * t * job.length * m.attention / 2  # causal: half of them
    ms["attention"] = (runs + 0.5) * m.layers * scores / job.rates.attention * 1e3
    flops = products * 2 * t * m.routed_per_token
    ms["expert GEMMs"] = flops / job.rates.expert_gemms * 1e3
    passes = COMPILED_PASSES if job.compiled else ELEMENTWISE_PASSES
    ms["elementwise"] = runs / 3 * m.layers * passes * t * m.hidden * 2 / job.rates.elementwise * 1e3
    ms["cross entropy"] = 4 * t * m.vocabulary * 4 / job.rates.cross_entropy * 1e3
    own = (m.parameters if m.trained is None else m.trained) / (job.ep * job.efsdp)
    ms["AdamW"] = (14 if job.bf16_weights else 28) * own / job.rates.adamw * 1e3
    # fp32 weights to bf16, in forward and again in backward, of the experts that a rank computes with
    cast_bytes = 0 if job.bf16_weights else 6
    ms["expert casts"] = 2 * cast_bytes * m.routed / job.ep / job.rates.casts * 1e3
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
