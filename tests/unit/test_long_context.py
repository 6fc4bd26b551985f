"""Context parallelism without ranks: the load-balancing loss is every family's own, and some are refused."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers

from accel_moe import long_context, patching, ring_limits
from accel_moe.long_context import Split
from tests.tiny import tiny_model

MODELS = Path(transformers.__file__).parent / "models"


def balancing_functions():
    """module name -> the module, of every family that has a load-balancing loss."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if path.parent.name in ("doge", "nllb_moe", "switch_transformers"):  # prepare() refuses them
            continue
        if re.search(r"^def load_balancing_loss_func", path.read_text(), re.MULTILINE):
            name = f"transformers.models.{path.parent.name}.{path.stem}"
            yield name, importlib.import_module(name)


def test_the_load_balancing_loss_is_that_of_every_family(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **named: None)
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(12, 6, generator=generator) for _ in range(3))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    split, seen = Split(None, 1, 0), 0
    for name, module in balancing_functions():
        patch = patching.Patch(f"{name}.load_balancing_loss_func", long_context.load_balancing_loss_func, "", "")
        assert patching.off_leash(patch) is None, patching.off_leash(patch)
        for given in (None, mask):
            expected = module.load_balancing_loss_func(logits, 6, 2, given)
            found = long_context.balancing_loss(logits, 6, 2, given, split)
            torch.testing.assert_close(found, expected, msg=name)  # fp32 sums in another order
        seen += 1
    assert seen > 20


def test_attention_that_has_no_ring_is_refused():
    with pytest.raises(ValueError, match="needs attn_implementation='sdpa', and Qwen3MoeForCausalLM has 'eager'"):
        ring_limits.check_model(tiny_model(), 2)
    with pytest.raises(ValueError, match="cp_size=2: Linear has no attention module named self_attn"):
        ring_limits.check_model(torch.nn.Linear(1, 1), 2)


def test_masks_that_pad_on_the_right_and_counted_positions_pass():
    ids = torch.zeros(2, 8, dtype=torch.long)
    mask, positions = torch.tensor([[1] * 8, [1] * 5 + [0] * 3]), torch.arange(3, 11).repeat(2, 1)
    for given in (mask, mask.bool()):
        ring_limits.check_batch({"input_ids": ids, "attention_mask": given, "position_ids": positions}, 4)
    with pytest.raises(ValueError, match="must be a multiple of 2 x cp_size = 6"):
        ring_limits.check_batch({"input_ids": ids}, 3)
