"""TRL's trainers on experts over ranks: losses, gradient norms and gradients are those of one process.

SFT packs several samples into a row, whose positions start again; DPO runs a second, frozen model of its own between
the forwards of the first. Everything is in fp32: what differs is the order of sums.
"""

from dataclasses import dataclass

import pytest
import torch

from tests.distributed.parity import Case, clean, whole
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
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


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
            parallelism_config=ParallelismConfig(dp_shard_size=case.world),
        )
    return cls(
        output_dir=folder,
        per_device_train_batch_size=4 // case.world,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        router_aux_loss_coef=0.0,  # TRL's default: a product of means over a rank's tokens, which one process has not
        use_cpu=case.world == 1 and not torch.cuda.is_available(),
        **{"logging_steps": 1, **launched, **more},
    )


def prepared(case: Case, folder: str, deferred: bool = False):
    """As scripts do: the base from a folder, which DPO loads once more as its reference."""
    from transformers import AutoModelForCausalLM

    import accel_moe
    import accel_moe.cpu

    load = accel_moe.from_pretrained if deferred else AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="float32", attn_implementation="eager")
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


def sft_lora(case: Case, folder: str) -> Trained:
    """TRL wraps the model in its constructor; over ranks the base has no values then."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    generator = torch.Generator().manual_seed(3)
    rows = Dataset.from_list([{"text": sentence(generator, 9)} for _ in range(16)])
    model = prepared(case, folder, deferred=case.world > 1)
    assert case.world == 1 or any(p.is_meta for p in model.parameters())
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False
    )
    torch.manual_seed(5)
    args = arguments(SFTConfig, case, folder + "/out", max_length=24, shuffle_dataset=False)
    return run(SFTTrainer, model=model, args=args, train_dataset=rows, peft_config=config)


def dpo(case: Case, folder: str) -> Trained:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    generator = torch.Generator().manual_seed(3)
    columns = {"prompt": 6, "chosen": 9, "rejected": 5}
    rows = [{name: sentence(generator, most) for name, most in columns.items()} for _ in range(8)]
    model, args = prepared(case, folder), arguments(DPOConfig, case, folder + "/out")
    return run(DPOTrainer, model=model, args=args, train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(sft, marks=pytest.mark.slow, id="SFT with packing"),
        pytest.param(sft_lora, id="SFT with peft_config"),
        pytest.param(dpo, id="DPO with a loaded reference"),
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
            for name, gradient in gradients.items():
                gap = (found.gradients[step][name] - gradient).abs().max().item()
                assert gap <= 1e-4 * gradient.abs().max().item() + 1e-6, (step, name, gap)
