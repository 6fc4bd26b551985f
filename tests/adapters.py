"""Adapters and their bases for the tests of merging, and PEFT's own merge as the oracle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.exports import read_weights

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def experts_parameters(model: nn.Module) -> list[str]:
    """Every family's stacks of matrices, as `target_parameters` names them."""
    stacks = (n.split(".") for n, p in model.named_parameters() if p.dim() == 3)
    return sorted({".".join(parts[-2:]) for parts in stacks if "experts" in parts[-2]})


def wrap(model: nn.Module, seed: int = 1, **options):
    """A PEFT model around `model` with random factors: as PEFT starts, lora_B is zero and nothing would change."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **options}))
    return randomised(wrapped, seed)


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("lora_" in name or "modules_to_save" in name) and not parameter.is_meta:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge of an adapter into a base of any dtype, in float32: what save_pretrained writes of it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return read_weights(out)
