"""How long save_state holds up training: stock accelerate, with checksums, in the background. Needs 2 GPUs.

    python -m tests.distributed.test_checkpoint_speed FOLDER [layers]

prints the table for RESULTS.md: a Qwen3-MoE of 1.5 B parameters (8 layers), fp32 with AdamW, about 18 GB a checkpoint.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.checkpoint_runs import WithOptions
from tests.ranks import run_ranks

STOCK, CHECKSUMS, BACKGROUND = "stock accelerate", "with checksums", "in the background"


def measure(folder: str, layers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds that save_state blocks, by kind of save, in the order of the saves. Runs on every rank."""
    import accelerate
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import accel_moe
    import accel_moe.cpu
    from accel_moe import ranks
    from accel_moe.checkpoint import background

    accel_moe.cpu.enable()
    small = not torch.cuda.is_available()
    config = Qwen3MoeConfig(
        vocab_size=1024 if small else 32768,
        hidden_size=64 if small else 2048,
        moe_intermediate_size=32 if small else 768,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=8 if small else 128,
        num_experts=32,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    accel_moe.prepare(model, moe_ep_degree=2, moe_kernel="grouped_mm")
    state = model._accel_moe
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3MoeDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin, mixed_precision="bf16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        tokens = torch.randint(0, config.vocab_size, (1, 64), device=accelerator.device)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    def timed(save) -> float:
        step()
        if not small:
            torch.cuda.synchronize()
        ranks.barrier()
        started = time.perf_counter()
        save()
        if not small:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    target = Path(folder) / "c"

    def clear() -> None:
        ranks.barrier()
        if accelerator.process_index == 0:
            shutil.rmtree(target, ignore_errors=True)
        ranks.barrier()

    results: dict[str, list[float]] = {STOCK: [], CHECKSUMS: [], BACKGROUND: []}
    stock = accelerate.Accelerator.save_state.__wrapped__
    for _ in range(repeats):  # by turns, so that a disk that tires slows both
        clear()
        results[STOCK].append(timed(lambda: stock(accelerator, str(target))))
        clear()
        results[CHECKSUMS].append(timed(lambda: accelerator.save_state(str(target))))
    model._accel_moe = WithOptions(state, {"moe_async_save": True})
    for _ in range(repeats + 1):
        clear()
        results[BACKGROUND].append(timed(lambda: accelerator.save_state(str(target))))
        background.wait_for_background()
    clear()
    return results


def report(results: dict[str, list[float]]) -> str:
    best = {kind: min(times if kind != BACKGROUND else times[1:]) for kind, times in results.items()}
    rows = ["| save | blocks the step for (s), in order | best | against stock |", "|---|---|---|---|"]
    for kind, times in results.items():
        listed = ", ".join(f"{t:.2f}" for t in times)
        rows.append(f"| {kind} | {listed} | {best[kind]:.2f} | {best[kind] / best[STOCK]:.2f} |")
    return "\n".join(rows)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checksums_cost_little_and_the_background_blocks_less_than_a_fifth(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    results = run_ranks(measure, 2, str(tmp_path), 8, 2, timeout_s=840)[0]
    print(report(results))
    stock = min(results[STOCK])
    assert min(results[CHECKSUMS]) <= 1.10 * stock, report(results)
    assert min(results[BACKGROUND][1:]) < 0.2 * stock, report(results)


if __name__ == "__main__":
    layers = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    print(report(run_ranks(measure, 2, sys.argv[1], layers, 2, timeout_s=560)[0]))
