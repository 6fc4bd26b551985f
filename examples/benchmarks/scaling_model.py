"""The model on paper behind SCALING.md: a step's time for Qwen3-30B-A3B under expert parallelism, term by term.

    python examples/benchmarks/scaling_model.py

Nothing is measured here. accel_moe/planning/step.py holds the model and its rates. The first eleven rows of the table
were run, and check the model. A column of its own applies the factor between the first row and the model to the other
rows. Rows without a card are of H100s.
"""

from __future__ import annotations

from dataclasses import dataclass

from accel_moe.planning.step import H200, Job, Model, host_ms, step_ms, terms_ms

HIDDEN, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, INTERMEDIATE = 2048, 151936, 32, 4, 128, 128, 8, 768


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    job: Job
    measured_ms: float | None = None


def qwen3(layers: int) -> Model:
    """Qwen3-30B-A3B cut to some of its layers. Embeddings are not tied."""
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    return Model(
        layers=layers,
        moe_layers=layers,
        hidden=HIDDEN,
        vocabulary=VOCABULARY,
        attention=HEADS * HEAD_DIM,
        experts=EXPERTS,
        top_k=TOP_K,
        dense=layers * (attention + HIDDEN * EXPERTS),
        routed=layers * 3 * EXPERTS * HIDDEN * INTERMEDIATE,
        embeddings=2 * VOCABULARY * HIDDEN,
    )


SIX, SIXTEEN, WHOLE = qwen3(6), qwen3(16), qwen3(48)
ROWS = [
    Row("6 layers, 2 GPUs, ep 2, H200", Job(SIX, ep=2, rates=H200), measured_ms=150),
    Row("6 layers, 2 GPUs, ep 2, H200, compiled", Job(SIX, ep=2, compiled=True, rates=H200), measured_ms=123),
    Row("the same, 2048 tokens", Job(SIX, ep=2, tokens=2048, length=2048, rates=H200), measured_ms=67),
    Row("the same, 2048 tokens, compiled",
        Job(SIX, ep=2, tokens=2048, length=2048, compiled=True, rates=H200), measured_ms=65),
    Row("6 layers, 4 GPUs, ep 4, H200", Job(SIX, ep=4, rates=H200), measured_ms=144),
    Row("6 layers, 4 GPUs, ep 4, H200, compiled", Job(SIX, ep=4, compiled=True, rates=H200), measured_ms=116),
    Row("6 layers, 2 GPUs, ep 2, H100", Job(SIX, ep=2), measured_ms=172),
    Row("6 layers, 2 GPUs, ep 2, H100, compiled (older)", Job(SIX, ep=2, compiled=True), measured_ms=139),
    Row("16 layers, 4 GPUs, ep 4, 4096 tokens, H100 (older)", Job(SIXTEEN, ep=4, tokens=4096), measured_ms=305),
    Row("48 layers, 4 GPUs, ep 4, bf16 weights, H200 (older)",
        Job(WHOLE, ep=4, bf16_weights=True, rates=H200), measured_ms=1081),
    Row("the same, compiled (older)",
        Job(WHOLE, ep=4, bf16_weights=True, compiled=True, rates=H200), measured_ms=607),
    Row("8 GPUs, ep 8, bf16 weights, compiled", Job(WHOLE, ep=8, bf16_weights=True, compiled=True)),
    Row("8 GPUs, ep 8", Job(WHOLE, ep=8, checkpointing=True)),
    Row("8 GPUs, ep 4 x efsdp 2", Job(WHOLE, ep=4, efsdp=2, checkpointing=True)),
    Row("64 GPUs, ep 8 x efsdp 8", Job(WHOLE, ep=8, efsdp=8, checkpointing=True)),
    Row("64 GPUs, 8 replicas of ep 8", Job(WHOLE, ep=8, replicas=8, checkpointing=True)),
    Row("64 GPUs, ep 64", Job(WHOLE, ep=64, checkpointing=True)),
    Row("64 GPUs, ep 8 x efsdp 8, 32768 tokens", Job(WHOLE, ep=8, efsdp=8, tokens=32768, checkpointing=True)),
    Row("512 GPUs, ep 8 x efsdp 64", Job(WHOLE, ep=8, efsdp=64, checkpointing=True)),
    Row("512 GPUs, 8 replicas of ep 8 x efsdp 8", Job(WHOLE, ep=8, efsdp=8, replicas=8, checkpointing=True)),
    Row("512 GPUs, 8 replicas of ep 8 x efsdp 8, 32768 tokens",
        Job(WHOLE, ep=8, efsdp=8, replicas=8, tokens=32768, checkpointing=True)),
]  # fmt: skip


def main() -> None:
    names = list(terms_ms(ROWS[0].job))
    unexplained = ROWS[0].measured_ms / step_ms(terms_ms(ROWS[0].job))[0]
    print(f"| job | {' | '.join(names)} | GPU ms | host ms | tokens/s/GPU on paper | / {unexplained:.2f} | measured |")
    print("|---|" + "---|" * (len(names) + 5))
    for row in ROWS:
        job = row.job
        terms, host = terms_ms(job), host_ms(job)
        slow, fast = step_ms(terms)
        rates = []
        for factor in (1.0, unexplained):
            low, high = (job.tokens / max(ms * factor, host) * 1e3 for ms in (slow, fast))
            rates.append(f"{low:,.0f} to {high:,.0f}" if high - low > 1 else f"{low:,.0f}")
        found = f"{row.measured_ms:.0f} ms, {job.tokens / row.measured_ms * 1e3:,.0f}" if row.measured_ms else ""
        cells = [row.name, *(f"{terms[name]:.0f}" for name in names), f"{fast:.0f} to {slow:.0f}", f"{host:.0f}"]
        print(f"| {' | '.join([*cells, *rates, found])} |")


if __name__ == "__main__":
    main()
