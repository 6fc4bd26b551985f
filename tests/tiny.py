"""Tiny random models and batches that every test builds alike, on any rank: same seed, same numbers."""

from __future__ import annotations

import torch

VOCAB, HIDDEN, LAYERS = 64, 32, 2
COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="eager",
    use_cache=False,  # accelerate's activation checkpointing runs a layer twice: it must not append to a cache
)


def tiny_config(family: str, *, num_experts: int = 8, top_k: int = 2, tie: bool = False, **more):
    """The config of a tiny model of `family`, whose layers all have experts (where the family allows it)."""
    from transformers import (
        DeepseekV3Config,
        Glm4MoeConfig,
        GraniteMoeConfig,
        MixtralConfig,
        OlmoeConfig,
        Qwen3MoeConfig,
    )

    common: dict = {**COMMON, "tie_word_embeddings": tie, **more}
    if family == "qwen3_moe":
        common.setdefault("head_dim", 8)
        return Qwen3MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
        )
    if family == "mixtral":
        return MixtralConfig(**common, intermediate_size=24, num_local_experts=num_experts, num_experts_per_tok=top_k)
    if family == "olmoe":
        return OlmoeConfig(**common, intermediate_size=24, num_experts=num_experts, num_experts_per_tok=top_k)
    if family == "granitemoe":
        return GraniteMoeConfig(
            **common, intermediate_size=24, num_local_experts=num_experts, num_experts_per_tok=top_k
        )
    if family == "deepseek_v3":
        common["num_key_value_heads"] = 4
        return DeepseekV3Config(
            **common,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=num_experts,
            num_experts_per_tok=top_k,
            n_group=2,
            topk_group=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    if family == "glm4_moe":
        return Glm4MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=24,
            n_routed_experts=num_experts,
            num_experts_per_tok=top_k,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            head_dim=8,
        )
    raise ValueError(family)


def tiny_model(family: str = "qwen3_moe", *, seed: int = 0, **options):
    """A float32 model whose numbers depend on the seed alone, with weights large enough that routing varies."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed + 1)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if name.endswith("e_score_correction_bias"):
                parameter.zero_()
    model.tie_weights()
    return model


def decoder_layer_names(model) -> list[str]:
    return sorted(model._no_split_modules or [])


def all_to_first_experts(model) -> None:
    """Rig every router so that all tokens choose among experts 0..3 of 8: at ep 2 and more, some rank gets none.

    Logits of the pairs (0, 2) and (1, 3) are +-a and +-0.9a for one direction of the hidden state, of the rest 0, so
    the top 2 are always one of the two pairs.
    """
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if type(module).__name__.endswith(("Router", "Gating")) and weight is not None and weight.shape[0] == 8:
                v = weight[0].clone()
                weight.zero_()
                for expert, factor in enumerate((1.0, -1.0, 0.9, -0.9)):
                    weight[expert] = factor * v


def batches(steps: int, sequences: int = 8, length: int = 6, seed: int = 7) -> list[torch.Tensor]:
    """`steps` whole batches of token ids, [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (sequences, length), generator=generator) for _ in range(steps)]
