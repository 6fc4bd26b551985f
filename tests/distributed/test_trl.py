"""TRL's trainers on experts over ranks: losses, gradient norms and gradients are those of one process.

SFT packs several samples into a row, whose positions start again, or trains on the assistant's tokens alone, of which
each rank has another number. DPO runs a frozen reference between the forwards of the policy: a model that TRL loads,
one that accel_moe shards, or the policy with its adapter switched off. GRPO generates between its steps. Everything is
in fp32: only sums have another order.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from tests.distributed.parity import Case, accelerator_for, clean, whole
from tests.ranks import run_ranks
from tests.tiny import VOCAB, decoder_layer_names, tiny_model

STEPS = 2
ONE, RANKS = Case(1, 1), Case(2, 2)


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT_TEMPLATE, **special)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }} <end>{% endgeneration %}{% else %}{{ message.content }} <end>{% endif %} "
    "{% endfor %}"
)


def sentence(generator: torch.Generator, most: int) -> str:
    length = int(torch.randint(2, most, (1,), generator=generator))
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def arguments(cls, case: Case, folder: str, **more):
    launched = {}
    if case.world > 1:
        from accelerate.parallelism_config import ParallelismConfig

        launched = dict(
            fsdp=True,
            fsdp_config={
                "fsdp_version": 2,
                "transformer_layer_cls_to_wrap": decoder_layer_names(tiny_model()),
                "cpu_ram_efficient_loading": False,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
            parallelism_config=ParallelismConfig(dp_shard_size=case.world // case.cp, cp_size=case.cp),
        )
    return cls(
        output_dir=folder,
        per_device_train_batch_size=4 * case.cp // case.world,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=case.world == 1 and not torch.cuda.is_available(),
        # TRL's default of the coefficient is not 0: a product of means over a rank's tokens, which one process has not
        **{"logging_steps": 1, "router_aux_loss_coef": 0.0, **launched, **more},
    )


def prepared(case: Case, folder: str, deferred: bool = False):
    """As scripts do: the base from a folder, which DPO loads once more as its reference."""
    from transformers import AutoModelForCausalLM

    import accel_moe
    import accel_moe.cpu

    load = accel_moe.from_pretrained if deferred else AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="float32", attn_implementation="sdpa" if case.cp > 1 else "eager")
    if case.world == 1:
        model.set_experts_implementation("eager")
        return model
    accel_moe.cpu.enable()
    return accel_moe.prepare(model, moe_ep_degree=case.ep)


def run(cls, **options) -> Trained:
    gradients = []

    class Recording(cls):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if not self.accelerator.sync_gradients:
                return loss
            named = ((clean(n).removeprefix("module."), p.grad) for n, p in model.named_parameters())
            gradients.append({name: whole(gradient) for name, gradient in named if gradient is not None})
            return loss

    Recording.__name__ = cls.__name__
    trainer = Recording(processing_class=tokenizer(), **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Trained([log["loss"] for log in logs], [float(log["grad_norm"]) for log in logs], gradients)


def sft(case: Case, folder: str) -> Trained:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"text": sentence(generator, 9)} for _ in range(48)])
    more = dict(max_length=24, packing=True, packing_strategy="bfd", shuffle_dataset=False)
    model, args = prepared(case, folder), arguments(SFTConfig, case, folder + "/out", **more)
    return run(SFTTrainer, model=model, args=args, train_dataset=rows)


def sft_split(case: Case, folder: str) -> Trained:
    """Ranks share each sequence, so that the load-balancing loss, which TRL takes from Mixtral, is one process's."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    case = replace(case, cp=case.world)
    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"text": sentence(generator, 9)} for _ in range(16)])
    more = dict(max_length=24, shuffle_dataset=False, pad_to_multiple_of=4, router_aux_loss_coef=0.5)
    model, args = prepared(case, folder), arguments(SFTConfig, case, folder + "/out", **more)
    return run(SFTTrainer, model=model, args=args, train_dataset=rows)


def chats(count: int) -> list[dict]:
    """Two of each four rows, which are one rank's, have far longer answers than the other two."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        answer = sentence(generator, 4) if i % 4 < 2 else " ".join(sentence(generator, 9) for _ in range(2))
        turns = [("user", sentence(generator, 6)), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def sft_chat(case: Case, folder: str) -> Trained:
    """The loss is a sum over `num_items_in_batch`: the assistant's tokens of all ranks and of both forwards."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    more = dict(assistant_only_loss=True, padding_free=True, max_length=None, shuffle_dataset=False)
    model = prepared(case, folder)
    args = arguments(SFTConfig, case, folder + "/out", gradient_accumulation_steps=2, **more)
    return run(SFTTrainer, model=model, args=args, train_dataset=Dataset.from_list(chats(16)))


def sft_lora(case: Case, folder: str) -> Trained:
    """TRL wraps the model in its constructor; over ranks the base has no values then."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"text": sentence(generator, 9)} for _ in range(16)])
    model = prepared(case, folder, deferred=case.world > 1)
    assert case.world == 1 or any(p.is_meta for p in model.parameters())
    args = arguments(SFTConfig, case, folder + "/out", max_length=24, shuffle_dataset=False)
    return run(SFTTrainer, model=model, args=args, train_dataset=rows, peft_config=lora())


def lora():
    """An adapter on attention and experts, with values: one that begins at nothing would equal its reference."""
    from peft import LoraConfig

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    torch.manual_seed(5)
    return LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)


def dpo(case: Case, folder: str) -> Trained:
    return run_dpo(case, folder, prepared(case, folder))


def run_dpo(case: Case, folder: str, model, **more) -> Trained:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    generator = torch.Generator().manual_seed(3)
    columns = {"prompt": 6, "chosen": 9, "rejected": 5}
    rows = [{name: sentence(generator, most) for name, most in columns.items()} for _ in range(8)]
    args = arguments(DPOConfig, case, folder + "/out")
    return run(DPOTrainer, model=model, args=args, train_dataset=Dataset.from_list(rows), **more)


def dpo_lora(case: Case, folder: str) -> Trained:
    """The reference is the policy with its adapter switched off, experts' adapters too."""
    return run_dpo(case, folder, prepared(case, folder, deferred=case.world > 1), peft_config=lora())


def dpo_sharded(case: Case, folder: str) -> Trained:
    """The reference is prepared before the trainer is made: no rank holds it whole."""
    reference = prepared(case, folder, deferred=case.world > 1)
    if case.world > 1:
        unused = torch.optim.SGD(reference.parameters())  # accelerate shards no model without an optimizer
        reference, _ = accelerator_for(case, reference).prepare(reference, unused)
        assert all(p.is_cpu and p.to_local().shape[0] == 4 for n, p in reference.named_parameters() if "experts" in n)
    return run_dpo(case, folder, prepared(case, folder, deferred=case.world > 1), ref_model=reference)


class Draws:
    """In place of torch.multinomial: row k of the whole batch draws its k-th best token, and ends after 3 + 2 k."""

    def __init__(self, rank: int):
        self.rank, self.step = rank, 0

    def __call__(self, probabilities: torch.Tensor, num_samples: int = 1) -> torch.Tensor:
        count = len(probabilities)
        rows = (torch.arange(count) + self.rank * count).to(probabilities.device)
        drawn = probabilities.topk(4, dim=-1).indices.gather(1, (rows % 4)[:, None])
        self.step += 1
        return drawn.masked_fill((self.step > 3 + 2 * rows)[:, None], tokenizer().eos_token_id)


def letters(completions: list[str], **_) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def grpo(case: Case, folder: str) -> Trained:
    """Completions by transformers' generate, on each rank of other lengths, four a prompt over both ranks."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Drawing(GRPOTrainer):
        def _generate(self, prompts):
            rank, drawn = self.accelerator.process_index, torch.multinomial
            torch.multinomial = Draws(rank)
            try:
                completions = super()._generate(prompts)
            finally:
                torch.multinomial = drawn
            lengths = [len(ids) for ids in completions[1]]
            assert lengths == [4 + 2 * (k + rank * len(prompts)) for k in range(len(prompts))]
            return completions

    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"prompt": sentence(generator, 6)} for _ in range(8)])
    model = prepared(case, folder, deferred=case.world > 1)
    more = dict(num_generations=4, max_completion_length=12, generation_kwargs={"use_cache": True})
    args = arguments(GRPOConfig, case, folder + "/out", **more)
    return run(Drawing, model=model, args=args, train_dataset=rows, reward_funcs=letters)


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="no kernel of sdpa takes grouped heads in fp32")


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(sft, marks=pytest.mark.slow, id="SFT with packing"),
        pytest.param(sft_lora, marks=pytest.mark.slow, id="SFT with peft_config"),
        pytest.param(sft_split, marks=on_cpu, id="SFT with context parallelism and the load-balancing loss"),
        pytest.param(sft_chat, id="SFT on the assistant's tokens, padding-free, accumulated"),
        pytest.param(dpo, marks=pytest.mark.slow, id="DPO with a loaded reference"),
        pytest.param(dpo_lora, id="DPO with the adapter switched off"),
        pytest.param(dpo_sharded, id="DPO with a sharded reference"),
        pytest.param(grpo, id="GRPO with transformers' generate"),
    ],
)
def test_a_trl_trainer_over_ranks_equals_one_process(train, tmp_path):
    pytest.importorskip("trl")
    tiny_model(num_experts=8).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (expected,) = run_ranks(train, 1, ONE, str(tmp_path))
    for found in run_ranks(train, 2, RANKS, str(tmp_path)):
        assert len(found.losses) == STEPS and found.losses == pytest.approx(expected.losses, rel=1e-4)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)
        for step, gradients in enumerate(expected.gradients):
            assert found.gradients[step].keys() == gradients.keys()
            # AdamW's first step divides by the gradient's own size, and so enlarges the noise of entries near zero
            relative = 1e-4 if step == 0 else 1e-3
            for name, gradient in gradients.items():
                gap = (found.gradients[step][name] - gradient).abs().max().item()
                assert gap <= relative * gradient.abs().max().item() + 1e-6, (step, name, gap)


def dpo_split(case: Case, folder: str) -> str:
    """The error of train()."""
    with pytest.raises(ValueError) as refused:
        dpo(replace(case, cp=2), folder)
    return str(refused.value)


def test_dpo_with_context_parallelism_is_refused(tmp_path):
    pytest.importorskip("trl")
    tiny_model(num_experts=8).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for told in run_ranks(dpo_split, 2, RANKS, str(tmp_path)):
        assert "DPOTrainer got a batch with completion_mask" in told, told


def dpo_with_a_reference_left_whole(case: Case, folder: str, how: str) -> str:
    """The error of train()."""
    import accel_moe

    reference = accel_moe.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    if how == "prepared":
        reference = prepared(case, folder, deferred=False)
    model = prepared(case, folder, deferred=True)
    with pytest.raises(ValueError) as refused:
        run_dpo(case, folder, model, ref_model=reference)
    return str(refused.value)


@pytest.mark.parametrize("how", ["prepared", "read by from_pretrained alone"])
def test_a_reference_that_was_not_sharded_is_refused_before_the_first_step(how, tmp_path):
    pytest.importorskip("trl")
    tiny_model(num_experts=8).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    told = run_ranks(dpo_with_a_reference_left_whole, 2, RANKS, str(tmp_path), how)
    assert all("ref_model is a model of accel_moe that did not go through accelerator.prepare" in text for text in told)
