"""The model on paper behind SCALING.md: a step's time for Qwen3-30B-A3B under expert parallelism, term by term.

    python examples/benchmarks/scaling_model.py

Nothing is measured here. `MEASURED` holds rates that other benchmarks measured on H100s (RESULTS.md). `LINKS` holds the
nominal bandwidth of a DGX H100's links, and the share of it that collectives usually reach. The rest is counting. The
first five rows of the table were run, and check the model. A column of its own applies the factor between the first row
and the model to the other rows. The GPU bounds the first, the second and the fifth row. The host bounds the third and
the fourth, which check `HOST_MS_PER_LAYER`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

GB = 1e9


@dataclass(frozen=True)
class Model:
    """Shapes of a decoder with experts in every layer."""

    layers: int
    hidden: int = 2048
    vocabulary: int = 151936
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    experts: int = 128
    top_k: int = 8
    intermediate: int = 768

    @property
    def dense_per_layer(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.hidden * self.experts

    @property
    def experts_per_layer(self) -> int:
        return 3 * self.experts * self.hidden * self.intermediate

    @property
    def embeddings(self) -> int:
        return 2 * self.vocabulary * self.hidden  # in and out, untied

    @property
    def parameters(self) -> int:
        return self.layers * (self.dense_per_layer + self.experts_per_layer) + self.embeddings


@dataclass(frozen=True)
class Job:
    """How a model is trained: GPUs cut into replicas x efsdp x ep, sequences of `length`, `tokens` a GPU and step."""

    name: str
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
    measured_ms: float | None = None

    @property
    def gpus(self) -> int:
        return self.ep * self.efsdp * self.replicas


MEASURED = {
    "expert GEMMs, FLOP/s": 445e12,  # bench_experts.py, qwen3-30b-a3b, forward + backward
    "dense GEMMs, FLOP/s": 600e12,  # perf.md: 27 ms of the 6-layer step
    "attention, FLOP/s": 330e12,  # perf.md: 17 ms of the 6-layer step
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


def ranks_hit(model: Model, ep: int) -> float:
    """Expected number of ranks that a token goes to, under even routing; each rank counts once."""
    others = model.experts - model.experts // ep
    return ep * (1 - comb(others, model.top_k) / comb(model.experts, model.top_k))


def terms_ms(job: Job) -> dict[str, float]:
    """Milliseconds of each term of a step on one GPU, without overlap."""
    m, t = job.model, job.tokens
    runs = 4 if job.checkpointing else 3  # forward, backward twice its work, and the forward again
    ms: dict[str, float] = {}
    flops = runs * 2 * t * m.layers * m.dense_per_layer + 3 * 2 * t * m.embeddings / 2
    ms["dense GEMMs"] = flops / MEASURED["dense GEMMs, FLOP/s"] * 1e3
    scores = 2 * 2 * t * job.length * m.heads * m.head_dim / 2  # causal: half of them
    ms["attention"] = (runs + 0.5) * m.layers * scores / MEASURED["attention, FLOP/s"] * 1e3
    flops = runs * 2 * t * m.layers * m.top_k * 3 * m.hidden * m.intermediate
    ms["expert GEMMs"] = flops / MEASURED["expert GEMMs, FLOP/s"] * 1e3
    passes = COMPILED_PASSES if job.compiled else ELEMENTWISE_PASSES
    ms["elementwise"] = runs / 3 * m.layers * passes * t * m.hidden * 2 / MEASURED["elementwise, bytes/s"] * 1e3
    ms["cross entropy"] = 4 * t * m.vocabulary * 4 / MEASURED["cross entropy, bytes/s"] * 1e3
    own = m.parameters / (job.ep * job.efsdp)
    ms["AdamW"] = (14 if job.bf16_weights else 28) * own / MEASURED["AdamW, bytes/s"] * 1e3
    # fp32 weights to bf16, in forward and again in backward, of the experts that a rank computes with
    cast_bytes = 0 if job.bf16_weights else 6
    ms["expert casts"] = (
        2 * cast_bytes * m.layers * m.experts_per_layer / job.ep / MEASURED["elementwise, bytes/s"] * 1e3
    )
    ms["exchange"] = exchange_ms(job)
    ms["dense FSDP"] = fsdp_ms(job, m.layers * m.dense_per_layer + m.embeddings, job.ep * job.efsdp, strided=False)
    ms["expert FSDP"] = fsdp_ms(job, m.layers * m.experts_per_layer / job.ep, job.efsdp, strided=job.ep >= job.per_node)
    return ms


def exchange_ms(job: Job) -> float:
    """Four exchanges of rows a layer (dispatch and combine, forward and backward), each row once per rank.
    Checkpointing keeps the received rows and adds no exchange."""
    m = job.model
    hit = ranks_hit(m, job.ep) / job.ep  # the share of tokens that a given rank gets
    on_node = min(job.ep, job.per_node) - 1
    off_node = job.ep - 1 - on_node
    row_bytes = 4 * m.layers * job.tokens * hit * m.hidden * 2
    return (on_node * row_bytes / LINKS["NVLink"] + off_node * row_bytes / LINKS["InfiniBand"]) * 1e3


def fsdp_ms(job: Job, parameters: float, group: int, *, strided: bool) -> float:
    """All-gather in bf16 for forward and for backward, reduce-scatter in fp32 (or bf16), and the replicas' all-reduce.

    `strided`: the ranks of the group are on different nodes, one on each.
    """
    across = strided or group > job.per_node
    link = LINKS["InfiniBand"] if across else LINKS["NVLink"]
    # a ring over nodes: one GPU of each node passes on what all of the node need, eight of them share the work
    wires = 1 if strided or not across else job.per_node
    gradient_bytes = 2 if job.bf16_weights else 4
    moved = parameters * (2 + 2 + gradient_bytes) * (group - 1) / group / wires
    if across and not strided:
        moved = (
            parameters * (2 + 2 + gradient_bytes) / wires
        )  # and inside the node over NVLink, which is not what takes the time
    reduced = 2 * gradient_bytes * parameters / group * (job.replicas - 1) / job.replicas
    return (moved / link + reduced / LINKS["InfiniBand"]) * 1e3


def host_ms(job: Job) -> float:
    """Milliseconds that the host needs to launch a step, including checkpointing's second forward."""
    per_layer = COMPILED_HOST_MS_PER_LAYER if job.compiled else HOST_MS_PER_LAYER
    return job.model.layers * per_layer * (4 / 3 if job.checkpointing else 1)


def step_ms(terms: dict[str, float]) -> tuple[float, float]:
    """Milliseconds of the GPU: (without any overlap, with all of FSDP hidden behind compute)."""
    communication = terms["dense FSDP"] + terms["expert FSDP"]
    rest = sum(terms.values()) - communication
    return rest + communication, max(rest, communication)


SIX, SIXTEEN, WHOLE = Model(layers=6), Model(layers=16), Model(layers=48)
JOBS = [
    Job("6 layers, 2 GPUs, ep 2", SIX, ep=2, measured_ms=173),
    Job("6 layers, 2 GPUs, ep 2, compiled", SIX, ep=2, compiled=True, measured_ms=139),
    Job("16 layers, 4 GPUs, ep 4, 4096 tokens", SIXTEEN, ep=4, tokens=4096, measured_ms=305),
    Job("48 layers, 4 GPUs, ep 4, bf16 weights", WHOLE, ep=4, bf16_weights=True, measured_ms=1081),
    Job("the same, compiled", WHOLE, ep=4, bf16_weights=True, compiled=True, measured_ms=607),
    Job("8 GPUs, ep 8, bf16 weights, compiled", WHOLE, ep=8, bf16_weights=True, compiled=True),
    Job("8 GPUs, ep 8", WHOLE, ep=8, checkpointing=True),
    Job("8 GPUs, ep 4 x efsdp 2", WHOLE, ep=4, efsdp=2, checkpointing=True),
    Job("64 GPUs, ep 8 x efsdp 8", WHOLE, ep=8, efsdp=8, checkpointing=True),
    Job("64 GPUs, 8 replicas of ep 8", WHOLE, ep=8, replicas=8, checkpointing=True),
    Job("64 GPUs, ep 64", WHOLE, ep=64, checkpointing=True),
    Job("64 GPUs, ep 8 x efsdp 8, 32768 tokens", WHOLE, ep=8, efsdp=8, tokens=32768, checkpointing=True),
    Job("512 GPUs, ep 8 x efsdp 64", WHOLE, ep=8, efsdp=64, checkpointing=True),
    Job("512 GPUs, 8 replicas of ep 8 x efsdp 8", WHOLE, ep=8, efsdp=8, replicas=8, checkpointing=True),
    Job("512 GPUs, 8 replicas of ep 8 x efsdp 8, 32768 tokens", WHOLE, ep=8, efsdp=8, replicas=8, tokens=32768,
        checkpointing=True),
]  # fmt: skip


def main() -> None:
    names = list(terms_ms(JOBS[0]))
    unexplained = JOBS[0].measured_ms / step_ms(terms_ms(JOBS[0]))[0]
    print(f"| job | {' | '.join(names)} | GPU ms | host ms | tokens/s/GPU on paper | / {unexplained:.2f} | measured |")
    print("|---|" + "---|" * (len(names) + 5))
    for job in JOBS:
        terms, host = terms_ms(job), host_ms(job)
        slow, fast = step_ms(terms)
        rates = []
        for factor in (1.0, unexplained):
            low, high = (job.tokens / max(ms * factor, host) * 1e3 for ms in (slow, fast))
            rates.append(f"{low:,.0f} to {high:,.0f}" if high - low > 1 else f"{low:,.0f}")
        found = f"{job.measured_ms:.0f} ms, {job.tokens / job.measured_ms * 1e3:,.0f}" if job.measured_ms else ""
        cells = [job.name, *(f"{terms[name]:.0f}" for name in names), f"{fast:.0f} to {slow:.0f}", f"{host:.0f}"]
        print(f"| {' | '.join([*cells, *rates, found])} |")


if __name__ == "__main__":
    main()
