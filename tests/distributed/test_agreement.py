"""Ranks that bring different models, different rows, or nothing: said in words, before a collective pairs up."""

import datetime
import logging

import pytest
import torch
import torch.distributed as dist

import accel_moe
from accel_moe import agreement, whereabouts
from tests.distributed.parity import Case, prepared
from tests.distributed.test_bad_input import message_of, on_every_rank
from tests.ranks import run_ranks
from tests.tiny import tiny_model


def accelerator(timeout_s: float = 60):
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe.cpu

    accel_moe.cpu.enable()
    kwargs = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_s))
    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), kwargs_handlers=[kwargs])


def model_of_rank(what: str, other: bool):
    """The model that every rank has; or, on the other rank, one that differs in `what`."""
    options = {}
    if other:
        options = {
            "width": {"moe_intermediate_size": 16},
            "layers": {"num_hidden_layers": 3},
            "experts": {"num_experts": 12},
            "top-k": {"top_k": 4},
            "hidden": {"hidden_size": 48},
        }.get(what, {})
    if "moe_intermediate_size" in options:
        from transformers import AutoModelForCausalLM

        from tests.tiny import tiny_config

        config = tiny_config("qwen3_moe")
        config.moe_intermediate_size = options["moe_intermediate_size"]
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = tiny_model(**options)
    if other and what == "dtype":
        model.model.layers[1].mlp.experts.bfloat16()
    if other and what == "frozen":
        model.model.embed_tokens.requires_grad_(False)
    if other and what == "a router's top-k":
        model.model.layers[1].mlp.gate.top_k = 1
    return model


def different(what: str) -> str:
    here = accelerator()
    model = accel_moe.prepare(model_of_rank(what, here.process_index == 1), moe_ep_degree=2)
    return message_of(lambda: here.prepare(model, torch.optim.SGD(model.parameters())))


@pytest.mark.parametrize(
    "what, says",
    [
        ("width", ["layers.0.mlp.experts.gate_up_proj is [8, 48, 32] torch.float32", "[8, 32, 32] torch.float32"]),
        ("layers", ["model.layers.2", "is absent on rank 0", "on rank 1", "more"]),
        ("experts", ["[8, 48, 32] torch.float32, trained on rank 0", "[12, 48, 32] torch.float32, trained on rank 1"]),
        ("top-k", ["top_k is 2 on rank 0, 4 on rank 1"]),
        ("a router's top-k", ["model.layers.1.mlp.gate.top_k is 2 on rank 0, 1 on rank 1"]),
        pytest.param("hidden", ["embed_tokens.weight is [64, 32]", "[64, 48]"], marks=pytest.mark.slow),
        pytest.param("dtype", ["torch.float32, trained on rank 0, ", "torch.bfloat16"], marks=pytest.mark.slow),
        ("frozen", ["embed_tokens.weight is [64, 32] torch.float32, trained on rank 0", "frozen on rank 1"]),
    ],
)
def test_a_model_that_differs_between_ranks_is_said_on_every_rank_with_what_differs(what, says):
    message = on_every_rank(different, 2, what)
    assert message.startswith("The model differs between ranks: ") and "give every rank the same" in message
    for words in says:
        assert words in message, message


def one_without_prepare(timeout_s: float) -> tuple[str, str]:
    """(the error's type, its text)"""
    here = accelerator(timeout_s)
    model = tiny_model()
    if here.process_index == 0:
        accel_moe.prepare(model, moe_ep_degree=2)
    optimizer = torch.optim.SGD(model.parameters())
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("accel_moe").addHandler(handler)
    try:
        model, optimizer = here.prepare(model, optimizer)
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    except Exception as error:
        return type(error).__name__, "\n".join([*heard, str(error)])
    return "", ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL's watchdog ends the other rank's process, and so the test")
def test_a_rank_that_never_called_prepare_is_named_by_the_others_in_a_warning_and_at_the_timeout():
    kind, text = run_ranks(one_without_prepare, 2, 6.0, timeout_s=90)[0]
    assert kind == "RuntimeError", text
    warning, error = text.splitlines()
    assert "rank 1 of 2 did not come to accelerator.prepare() with a prepared model after 3 s" in warning
    assert "rank 1 of 2 did not come to accelerator.prepare() with a prepared model within 6 s" in error
    assert "does not call accel_moe.prepare(model)" in error and "InitProcessGroupKwargs" in error


def slow_rank() -> bool:
    import time

    here = accelerator(30)
    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2)
    agreement._WARN_S = 0.5
    if here.process_index == 1:
        time.sleep(3)  # loads for long
    model, _ = here.prepare(model, torch.optim.SGD(model.parameters()))
    return bool(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all())


def test_a_rank_that_is_only_slow_is_waited_for():
    assert run_ranks(slow_rank, 2) == [True, True]


def test_the_waiting_rank_warns_ever_more_rarely_and_only_the_first_of_those_that_are_there(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(whereabouts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(whereabouts.time, "sleep", lambda s: now.__setitem__(0, now[0] + 1.0))
    with caplog.at_level(logging.WARNING, "accel_moe"):
        for rank in (0, 2):
            with pytest.raises(RuntimeError, match=r"ranks 1, 3 of 4 did not come .* within 600 s"):
                agreement.wait_for_all(lambda: False, lambda: [1, 3], rank, 4, 600.0)
            now[0] = 0.0
    assert [record.args[1] for record in caplog.records] == [20.0, 40.0, 80.0, 160.0, 320.0]


def two_models_in_another_order() -> str:
    here, _, _ = prepared(Case(2, 2))
    models = [accel_moe.prepare(tiny_model(family), moe_ep_degree=2) for family in ("qwen3_moe", "mixtral")]
    first, second = models if here.process_index == 0 else reversed(models)
    return message_of(lambda: (here.prepare(first), here.prepare(second)))


def test_two_models_that_ranks_prepare_in_another_order_are_told_apart():
    assert "The model differs between ranks" in on_every_rank(two_models_in_another_order, 2)


# ---- Rows of different kinds, in a direct call of a layer


def other_kind(dispatcher: str, what: str) -> str:
    from accel_moe.dispatch import make_dispatcher
    from accel_moe.dispatch.base import RoutedTokens

    dist.init_process_group("gloo")
    exchange = make_dispatcher(dispatcher, dist.group.WORLD, 8)
    other = dist.get_rank() == 1
    top_k = 5 if other and what == "K" else 4
    hidden = torch.ones(
        3, 16 if other and what == "H" else 8, dtype=torch.float64 if other and what == "rows" else None
    )
    weights = torch.ones(3, top_k, dtype=torch.bfloat16 if other and what == "weights" else torch.float32)
    index = torch.arange(3 * top_k).view(3, top_k) % 8
    if what == "few":  # `auto` decides otherwise between these two
        index, weights = index[:, : 1 + other], weights[:, : 1 + other]
    text = message_of(lambda: exchange.dispatch(RoutedTokens(hidden, index, weights)))
    good = RoutedTokens(torch.ones(3, 8), torch.arange(12).view(3, 4) % 8, torch.ones(3, 4))
    same = exchange.dispatch(good)  # it goes on
    assert exchange.combine(same.rows, same).shape == (3, 8)
    return text


@pytest.mark.parametrize(
    "dispatcher, what, says",
    [
        (
            "all_to_all",
            "K",
            "top_k 4, hidden size 8, torch.float32 rows, torch.float32 routing weights on rank 0; top",
        ),
        ("all_to_all", "weights", "torch.bfloat16 routing weights on rank 1"),
        ("all_gather", "K", "top_k 5, hidden size 8, torch.float32 rows, torch.float32 routing weights on rank 1"),
        ("auto", "few", "top_k 2, hidden size 8"),
        pytest.param("all_to_all", "rows", "torch.float64 rows", marks=pytest.mark.slow),
        pytest.param("all_to_all", "H", "hidden size 16", marks=pytest.mark.slow),
        pytest.param("all_gather", "weights", "torch.bfloat16 routing weights on rank 1", marks=pytest.mark.slow),
        pytest.param("auto", "K", "top_k 5", marks=pytest.mark.slow),
    ],
)
def test_rows_of_another_kind_on_one_rank_are_refused_on_every_rank(dispatcher, what, says):
    message = on_every_rank(other_kind, 2, dispatcher, what)
    assert says in message and "Expected one kind on all of them" in message


def test_free_bytes_travel_beside_the_kind():
    from accel_moe.dispatch import kinds, memory

    kind = kinds.Kind(8, 2048, torch.bfloat16, torch.float32)
    for free in (0, 1023, 2**20, 80 * 2**30, memory.UNKNOWN):
        number = kinds.with_free_bytes(kind, free)
        assert 0 <= number < 2**62
        assert kinds.apart(number) == (kinds.number_of(kind), free)
    assert kinds.apart(kinds.with_free_bytes(kind, -5))[1] == 0


def test_weights_that_are_read_later_are_compared_by_shape_and_dtype(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = accel_moe.prepare(accel_moe.from_pretrained(str(tmp_path)))
    here = agreement.describe(model, model._accel_moe)
    assert here["lm_head.weight"] == f"{[*tiny_model().lm_head.weight.shape]} torch.float32, trained"
