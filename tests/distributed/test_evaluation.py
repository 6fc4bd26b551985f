"""Evaluation under expert parallelism: collective forwards, ragged batches, generate, metrics."""

import copy

import pytest
import torch

from tests.distributed.parity import Case, build, prepared
from tests.ranks import run_ranks
from tests.tiny import batches


def evaluate(case: Case):
    """Losses per example over a loader whose last batch is uneven, gathered as a user would."""
    accelerator, model, _ = prepared(case)
    rows = torch.cat(batches(2))[:13]  # 13 rows: the last batch is short, and short on some ranks only
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=2))
    model.eval()
    found = []
    for batch in loader:
        with torch.no_grad():
            logits = model(input_ids=batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
        found.append(accelerator.gather_for_metrics(loss.mean(1)))
    return torch.cat(found)


@pytest.mark.core
@pytest.mark.parametrize("case", [Case(2, 2), Case(4, 2)], ids=lambda c: c.name)
def test_evaluation_over_an_uneven_loader_equals_one_process(case):
    model = build(case).eval()
    rows = torch.cat(batches(2))[:13]
    with torch.no_grad():
        logits = model(input_ids=rows).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    for found in run_ranks(evaluate, case.world, case):
        torch.testing.assert_close(found, expected.mean(1), rtol=0, atol=1e-5)


def generate(case: Case):
    accelerator, model, _ = prepared(case)
    model.eval()
    prompt = batches(1)[0][accelerator.process_index : accelerator.process_index + 1, :4]
    length = 3 + 4 * accelerator.process_index  # ranks stop at different lengths: synced_gpus keeps them together
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=length, do_sample=False, synced_gpus=True, use_cache=True)


def test_generate_with_synced_gpus_equals_one_process():
    case = Case(2, 2)
    model = build(case).eval()
    for rank, found in enumerate(run_ranks(generate, 2, case)):
        prompt = batches(1)[0][rank : rank + 1, :4]
        with torch.no_grad():
            expected = copy.deepcopy(model).generate(prompt, max_new_tokens=3 + 4 * rank, do_sample=False)
        assert found.tolist() == expected.tolist()


def loads(case: Case):
    import accel_moe

    accelerator, model, _ = prepared(case)
    own = batches(1)[0].chunk(case.world)[accelerator.process_index]
    model(input_ids=own, labels=own).loss.backward()
    return accel_moe.expert_load(model)


@pytest.mark.parametrize("case", [Case(2, 2), Case(4, 2, checkpointing=True)], ids=lambda c: c.name)
def test_expert_load_is_summed_over_ranks_and_is_that_of_one_process(case):
    import accel_moe

    model = accel_moe.prepare(build(case), moe_kernel="grouped_mm")
    model(input_ids=batches(1)[0])
    expected = accel_moe.expert_load(model)
    for found in run_ranks(loads, case.world, case):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
