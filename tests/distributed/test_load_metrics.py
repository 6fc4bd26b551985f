"""The load of the experts over two ranks: in Trainer's and TRL's lines, and in a plain loop."""

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from tests.distributed.parity import Case, build
from tests.distributed.test_trl import arguments, sentence, tokenizer
from tests.distributed.trainer_parity import InOrder, trainer_arguments
from tests.ranks import run_ranks
from tests.tiny import LAYERS, batches

TOP_K, STEPS = 2, 4


@dataclass
class Found:
    lines: list[dict[str, float]]
    """Of log_history: the training lines."""
    others: list[dict[str, float]]
    slots: list[int]
    """By training line: all that the callback was given, summed over layers and experts."""
    files: list[str]


@contextmanager
def recorded_slots():
    """The list of all slots that the callback is given, by training line."""
    from accel_moe.monitoring import callback

    taken, slots = callback.trained_tokens_per_expert, []

    def recorded(*args):
        counts = taken(*args)
        slots.append(sum(int(row.sum()) for row in counts.values()))
        return counts

    callback.trained_tokens_per_expert = recorded
    yield slots


def prepared_model(case: Case):
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    return accel_moe.prepare(build(case), moe_ep_degree=case.ep, moe_kernel="grouped_mm")


def run(trainer, folder: str) -> Found:
    with recorded_slots() as slots:
        trainer.train()
    history = trainer.state.log_history
    lines, others = [[line for line in history if ("loss" in line) is kind] for kind in (True, False)]
    return Found(lines, others, slots, os.listdir(folder))


def train(case: Case, evaluates: bool) -> Found:
    from transformers import Trainer

    import accel_moe

    more = dict(max_steps=STEPS, logging_steps=2)
    if evaluates:  # before the first line, between two, and after the last
        more |= dict(eval_strategy="steps", eval_steps=1, eval_on_start=True, per_device_eval_batch_size=2)
    model, rows, callbacks = prepared_model(case), InOrder(), [accel_moe.ExpertLoadCallback()]
    with tempfile.TemporaryDirectory() as folder:
        args = trainer_arguments(case, folder, model, **more)
        trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
        return run(trainer, folder)


def train_packed(case: Case) -> tuple[Found, int]:
    """TRL's SFT, whose rows are packed, in evaluation too; and the tokens it trained on, over all ranks."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import accel_moe

    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"text": sentence(generator, 9)} for _ in range(48)])
    tokens = 0

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            nonlocal tokens
            tokens += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    more = dict(max_length=24, packing=True, packing_strategy="bfd", logging_steps=2, eval_steps=1)
    model, callbacks = prepared_model(case), [accel_moe.ExpertLoadCallback()]
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(SFTConfig, case, folder, eval_packing=True, eval_strategy="steps", **more)
        words, data = tokenizer(), dict(train_dataset=rows, eval_dataset=rows)
        found = run(Counting(model=model, args=args, processing_class=words, callbacks=callbacks, **data), folder)
    return found, int(over_ranks(tokens))


def over_ranks(tokens: int) -> torch.Tensor:
    summed = torch.tensor(tokens)
    torch.distributed.all_reduce(summed)
    return summed


@pytest.fixture(scope="module")
def with_evaluation():
    return run_ranks(train, 2, Case(2, 2), True)


def test_the_counts_of_every_line_are_tokens_times_top_k_times_layers(with_evaluation):
    of_a_line = 2 * batches(1)[0].numel() * TOP_K * LAYERS  # two steps of the whole batch
    assert [found.slots for found in with_evaluation] == [[of_a_line, of_a_line]] * 2


def test_evaluations_tokens_are_not_in_the_numbers(with_evaluation):
    without = run_ranks(train, 2, Case(2, 2), False)
    for found, expected in zip(with_evaluation, without):
        assert [line["step"] for line in found.lines] == [2, 4]
        assert len(found.others) == 1 + STEPS + 1  # evaluations, and the end's line
        for line, wanted in zip(found.lines, expected.lines):
            ours = {name: value for name, value in line.items() if name.startswith("expert_load/")}
            assert len(ours) == 5 + 4 * LAYERS
            assert ours == {name: wanted[name] for name in ours}  # exact: counts of the same routing
        assert not [name for line in found.others for name in line if "expert_load" in name]


def test_the_main_rank_draws_where_the_output_goes(with_evaluation):
    pytest.importorskip("matplotlib")
    assert "expert_load.png" in with_evaluation[0].files


def test_trl_packs_rows_and_evaluates_beside_the_callback():
    pytest.importorskip("trl")
    for found, tokens in run_ranks(train_packed, 2, Case(2, 2)):
        (line,) = found.lines
        assert found.slots == [tokens * TOP_K * LAYERS] and "eval_loss" in found.others[0]
        assert "expert_load/layer_01/entropy" in line and "mean_token_accuracy" in line


def one_process_counts() -> dict[str, float]:
    import accel_moe

    model = accel_moe.prepare(build(Case(1, 1)), moe_kernel="grouped_mm").train()
    for rows in batches(1):
        model(input_ids=rows)
    return accel_moe.expert_load_metrics(model)


def two_ranks_counts(case: Case) -> dict[str, float]:
    import accel_moe
    from tests.distributed.parity import prepared

    accelerator, model, _ = prepared(case)
    model.train()
    model(input_ids=batches(1)[0].chunk(case.world)[accelerator.process_index])
    return accel_moe.expert_load_metrics(model)


def test_a_plain_loops_numbers_are_those_of_one_process_on_every_rank():
    expected = one_process_counts()
    assert len(expected) == 5 + 4 * LAYERS
    assert run_ranks(two_ranks_counts, 2, Case(2, 2)) == [expected, expected]
