"""Batches that context parallelism cannot take: said on every rank that shares them, before a collective can hang."""

import datetime
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import accel_moe
from accel_moe import whereabouts
from tests.distributed.parity import Case, prepared
from tests.distributed.test_bad_input import message_of
from tests.ranks import run_ranks
from tests.tiny import batches

CASE = Case(2, 2, cp=2, lengths=(8,) * 3)


def ids(length: int = 8) -> torch.Tensor:
    return batches(1, sequences=2, length=length)[0]


def packed() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(), "labels": ids(), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}


def padded_on_the_left() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(), "labels": ids(), "attention_mask": torch.tensor([[0, 0] + [1] * 6] * 2)}


BATCHES = {
    "a length": (lambda: {"input_ids": ids(6), "labels": ids(6)}, "6 tokens cannot be split over cp_size=2"),
    "packed": (packed, "position_ids start again"),
    "left": (padded_on_the_left, "padding before a token"),
    "unknown": (lambda: {"input_ids": ids(), "labels": ids(), "pixel_values": ids()}, "a batch with pixel_values"),
    "no labels": (lambda: {"input_ids": ids()}, "needs input_ids and labels"),
}


def one_batch_after_the_other() -> dict[str, str]:
    accelerator, _, _ = prepared(CASE)

    def enter(make):
        with accel_moe.context_parallel(accelerator, make()):
            pass

    return {name: message_of(lambda make=make: enter(make)) for name, (make, _) in BATCHES.items()}


def test_a_batch_that_cannot_be_split_is_refused_on_every_rank():
    first, second = run_ranks(one_batch_after_the_other, 2, timeout_s=60)
    assert first == second
    for name, (_, words) in BATCHES.items():
        assert words in first[name], first[name]


def buffers_by_hand() -> list[str]:
    """accelerate's own context, which a script opens by itself."""
    accelerator, model, _ = prepared(CASE)

    def split(position_ids: bool = True, rank: int = 0, packs: bool = False):
        whole = {"input_ids": ids() + rank, "labels": ids()}
        if position_ids:
            whole["position_ids"] = packed()["position_ids"] if packs else torch.arange(8).repeat(2, 1)
        buffers = list(whole.values())
        with accelerator.maybe_context_parallel(buffers, [1] * len(buffers), set(buffers)):
            model(**whole)

    def of_ep_1():  # its forward is guarded, too
        nonlocal model
        _, model, _ = prepared(replace(CASE, ep=1))
        split(position_ids=False)

    def uneven():
        with accelerator.maybe_context_parallel([ids(), ids(12)], [1, 1]):
            pass

    differ = [message_of(lambda: split(rank=accelerator.process_index)) for _ in range(2)]
    mine = [message_of(lambda: split(position_ids=False)), message_of(lambda: split(packs=True))]
    return [*differ, message_of(uneven), *mine, message_of(of_ep_1)]


def test_buffers_that_a_script_splits_itself_are_looked_at_too():
    first, second = run_ranks(buffers_by_hand, 2, timeout_s=60)
    assert first == second
    said = [*["hold different batches"] * 2, "have [8, 12] tokens", "no position_ids", "start again", "no position_ids"]
    for message, words in zip(first, said, strict=True):
        assert words in message, message


def backward_outside(checkpointing: bool) -> str:
    accelerator, model, _ = prepared(replace(CASE, ep=2 if checkpointing else 1, checkpointing=checkpointing))
    tokens = ids(256 if torch.cuda.is_available() else 8)
    with accel_moe.context_parallel(accelerator, {"input_ids": tokens, "labels": tokens}) as part:
        loss = model(**part).loss
    with pytest.raises(RuntimeError) as caught:
        accelerator.backward(loss)
    return str(caught.value)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_backward_outside_of_the_context_is_refused(checkpointing):
    for message in run_ranks(backward_outside, 2, checkpointing, timeout_s=60):
        assert "Call accelerator.backward(loss) inside" in message


def trainer_with_packed_rows() -> str:
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import Trainer

    _, model, _ = prepared(CASE)
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2))
    trainer.args, trainer.compute_loss_func = SimpleNamespace(label_smoothing_factor=0.0), None
    return message_of(lambda: Trainer._prepare_context_parallel_inputs(trainer, model, packed()))


def test_trainer_refuses_packed_rows():
    for message in run_ranks(trainer_with_packed_rows, 2, timeout_s=60):
        assert "position_ids start again" in message


def refused_by_half(timeout_s: float) -> str:
    """Ranks 2 and 3 are given packed rows; what they say, and what the others' collective says at its timeout."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    accelerator, model, _ = prepared(Case(4, 4, cp=2))
    mine = {"input_ids": ids(), "labels": ids()} if accelerator.process_index < 2 else packed()

    def step() -> None:
        with accel_moe.context_parallel(accelerator, mine) as part:
            model(**part)

    if accelerator.process_index < 2:
        with pytest.raises(RuntimeError) as caught:
            step()
        return str(whereabouts.explained(caught.value))
    said = message_of(step)
    time.sleep(timeout_s + 2)
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL ends the process at its timeout")
def test_ranks_with_another_batch_are_told_why_they_waited():
    found = run_ranks(refused_by_half, 4, 6.0, timeout_s=90)
    for refused in found[2:]:
        assert "position_ids start again" in refused and "The 2 ranks that share this batch stop here." in refused
        assert "The other 2 wait for them" in refused
    waited = found[0]  # which keeps the store: rank 1 may find it gone
    assert "ranks 2-3 in a refusal of its batch (position_ids start again, or leap, inside a sequence" in waited


def test_the_end_of_the_script_repeats_the_refusal(monkeypatch):
    written = []
    monkeypatch.setattr(whereabouts, "_store", lambda: SimpleNamespace(set=lambda key, value: written.append(value)))
    monkeypatch.setattr(whereabouts, "_here", "")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    whereabouts.note_refusal(ValueError("Rows are packed. Unpack them."))
    whereabouts._note_the_end()
    whereabouts.note(whereabouts.TRAINING)
    whereabouts._note_the_end()
    assert [json.loads(value)[0] for value in written] == [
        "a refusal of its batch (Rows are packed)",
        "the end of its script, after a refusal of its batch (Rows are packed)",
        whereabouts.TRAINING,
        "the end of its script",
    ]
