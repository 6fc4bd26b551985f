"""What context parallelism refuses by looking at a model, a batch or a call, and what it lets pass."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig

from accel_moe import long_context, patching, ring_limits, trainer_parts
from tests.tiny import tiny_model


def model_with(**fields):
    model = tiny_model(attn_implementation="sdpa")
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'.*'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope_type 'dynamic'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layers of sliding_attention"),
        ({"layer_types": None, "sliding_window": 4}, "layers of sliding_attention"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ],
)
def test_a_model_without_a_ring_is_refused_by_name(fields, words):
    with pytest.raises(ValueError, match=f"cp_size=2: Qwen3MoeForCausalLM has {words}"):
        ring_limits.check_model(model_with(**fields), 2)


def test_a_model_with_a_ring_passes():
    for kind in ("default", "yarn", "linear", "llama3"):
        ring_limits.check_model(model_with(rope_parameters={"rope_type": kind}), 2)


def test_attention_that_is_a_list_of_modules_is_refused():
    model = torch.nn.Module()
    model.self_attn = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="no attention module named self_attn"):
        ring_limits.check_model(model, 2)


def test_a_family_without_sdpa_is_refused():
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(num_hidden_layers=1, hidden_size=8))
    assert "has no sdpa attention" in ring_limits.why_no_ring(model)


def test_a_run_is_told_what_no_config_tells():
    from tests.families.split_sequences import with_images

    alone, of_images = (ring_limits.conditions(model, 4) for model in (tiny_model(), with_images()))
    assert alone == of_images[:-1] and "text alone" in of_images[-1] and "multiple of 8 tokens" in alone[1]
    assert "in fp32 a GPU needs a multiple of 256" in ring_limits.conditions(tiny_model(), 4, "no")[-1]


# ---- Batches


def test_positions_of_padding_on_the_right_may_be_any():
    ids = torch.zeros(1, 8, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    ring_limits.check_batch({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, 2)
    ring_limits.check_buffers([ids, positions], 2)  # of a batch that was seen
    for given in ({}, {"attention_mask": torch.ones_like(mask)}):
        with pytest.raises(ValueError, match="start again"):
            ring_limits.check_batch({"input_ids": ids.clone(), "position_ids": positions, **given}, 2)


@pytest.fixture
def trainer():
    patching.install(patching.patches_of(trainer_parts))
    found = transformers.Trainer.__new__(transformers.Trainer)
    found.accelerator = SimpleNamespace(parallelism_config=ParallelismConfig(cp_size=2))
    found.args, found.compute_loss_func = SimpleNamespace(label_smoothing_factor=0.0), None
    yield found
    patching.uninstall(patching.patches_of(trainer_parts))


def whole_batch(**more):
    return {"input_ids": torch.zeros(1, 8, dtype=torch.long), "labels": torch.zeros(1, 8, dtype=torch.long), **more}


@pytest.mark.parametrize(
    "inputs, words",
    [
        (whole_batch(completion_mask=torch.ones(1, 8)), "Trainer got a batch with completion_mask"),
        (whole_batch(pixel_values=[torch.ones(1)]), "Trainer got a batch with pixel_values. Images, video and sound"),
        (whole_batch(position_ids=torch.arange(24).view(3, 1, 8)), r"position_ids \[3, 1, 8\] differ from plane to"),
        (whole_batch(cu_seq_lens_q=torch.ones(3)), "as those of packed sequences do"),
        ([whole_batch()], "Trainer got a batch of type list"),
    ],
)
def test_trainer_refuses_inputs_that_it_does_not_split(trainer, inputs, words):
    with pytest.raises(ValueError, match=words):
        trainer._prepare_context_parallel_inputs(torch.nn.Linear(1, 1), inputs)


def test_trainer_splits_a_batch_with_settings_in_it(trainer):
    trainer.accelerator.maybe_context_parallel = contextlib.nullcontext
    trainer._prepare_context_parallel_inputs(torch.nn.Linear(1, 1), whole_batch(use_cache=False))


def test_trainer_splits_one_plane_of_the_positions_of_text(trainer):
    """transformers would split [3, B, L] along the batch."""
    trainer.accelerator.maybe_context_parallel = contextlib.nullcontext
    batch = whole_batch(position_ids=torch.arange(8).expand(3, 1, -1))
    _, inputs = trainer._prepare_context_parallel_inputs(torch.nn.Linear(1, 1), batch)
    assert inputs["position_ids"].tolist() == [list(range(8))]


def test_trainer_refuses_losses_that_shift_labels_in_a_part(trainer):
    trainer.compute_loss_func = print
    with pytest.raises(ValueError, match="compute_loss_func shifts the labels"):
        trainer._prepare_context_parallel_inputs(torch.nn.Linear(1, 1), whole_batch())
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 shifts the labels.*cp_size=2"):
        trainer._prepare_context_parallel_inputs(torch.nn.Linear(1, 1), whole_batch())


def test_trainer_refuses_metrics_of_parts(trainer):
    with pytest.raises(ValueError, match="need whole logits and labels, and cp_size=2"):
        trainer.prediction_step(torch.nn.Linear(1, 1), whole_batch(), False)


def test_trainer_refuses_to_gather_objects_of_ranks_that_share_a_batch(trainer):
    trainer.args.eval_use_gather_object = True
    with pytest.raises(ValueError, match="eval_use_gather_object=True is not supported with cp_size=2"):
        trainer.evaluation_loop([], "Evaluation")


def test_a_loop_of_its_own_divides_by_a_count_in_fp32_and_takes_no_settings():
    """A count in double would turn the loss into double."""
    alone = SimpleNamespace(parallelism_config=None, device=torch.device("cpu"), reduce=lambda tensor, how: tensor)
    with long_context.context_parallel(alone, whole_batch()) as part:
        assert part["num_items_in_batch"].dtype == torch.float32
    with pytest.raises(ValueError, match="a batch with use_cache"):
        long_context.context_parallel(alone, whole_batch(use_cache=False)).__enter__()


# ---- Calls


def test_calls_that_the_kernels_cannot_take_are_refused():
    def call(tokens, dtype=torch.bfloat16, heads=(64, 64), dropout=0.0, on_gpu=True):
        query, value = (torch.empty(1, 1, tokens, size, dtype=dtype) for size in heads)
        ring_limits.check_call(query, value, dropout, on_gpu)

    call(60), call(64, torch.float32), call(128, heads=(192, 128)), call(60, torch.float32, on_gpu=False)
    with pytest.raises(ValueError, match=r"has 60 tokens.*multiple of 64.*fp32.*train in bf16"):
        call(60, torch.float32)
    with pytest.raises(ValueError, match=r"has 96 tokens.*heads of 192 and 128"):
        call(96, heads=(192, 128))
    with pytest.raises(ValueError, match=r"dropout_p=0\.1"):
        call(64, dropout=0.1)


# ---- Forwards of whole sequences


@pytest.fixture
def hooked():
    """A model with accelerate's hooks, as accelerator.prepare attaches them."""
    import accelerate.accelerator

    patching.install(patching.patches_of(long_context))
    model = tiny_model(attn_implementation="sdpa").eval()
    accelerate.accelerator._attach_context_parallel_hooks(model)
    yield model
    patching.uninstall(patching.patches_of(long_context))


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])},
    ],
    ids=["left-padded", "packed"],
)
def test_whole_sequences_keep_their_mask_outside_of_a_split(hooked, more):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found = hooked(input_ids=ids, **more).logits
        expected = tiny_model(attn_implementation="sdpa").eval()(input_ids=ids, **more).logits
        assert torch.equal(found, expected)
        with long_context._as_running(long_context.Split(None, 2, 0)):  # and lose it within one
            assert not torch.allclose(hooked(input_ids=ids, **more).logits, expected)


def test_a_new_split_is_not_compiled_anew(hooked):
    torch._dynamo.reset()
    counts, layer = torch._dynamo.testing.CompileCounter(), hooked.model.layers[0].self_attn

    def attended(x):
        return layer(x, (torch.ones(1, 4, 8), torch.zeros(1, 4, 8)), attention_mask=None)[0]

    compiled, x = torch.compile(attended, backend=counts), torch.randn(1, 4, 32)
    for step in range(4):
        with long_context._as_running(long_context.Split(None, 2, step)):
            compiled(x)
    assert counts.frame_count == 1
