"""What the tests of adapter checkpoints run on ranks: a LoRA run on a base in a folder, saved, resumed, gathered."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from tests.adapters import EXPERTS, randomised
from tests.distributed.checkpoint_runs import CONTINUED, TRAINED, Snapshot, clean, install, snapshot, train, whole
from tests.distributed.parity import Case, accelerator_for

LORA = dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])


def wrapped(base: str, **options):
    from peft import LoraConfig, get_peft_model

    import accel_moe

    model = accel_moe.from_pretrained(base, dtype=torch.float32)
    return randomised(get_peft_model(model, LoraConfig(**{**LORA, **options})))


def set_up(case: Case, base: str, everything: bool = False, **options):
    """(accelerator, model, optimizer); with `everything` the optimizer is given the frozen parameters, too."""
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = accel_moe.prepare(wrapped(base, **options), moe_ep_degree=case.ep)
    install()
    accelerator = accelerator_for(case, model.base_model.model)
    given = [p for p in model.parameters() if everything or p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(given, lr=1e-2))
    return accelerator, model, optimizer


def taken(model, optimizer) -> Snapshot:
    """What the run made: trained weights and moments. A collective."""
    found = snapshot(model, optimizer)
    trained = {clean(n) for n, p in model.named_parameters() if p.requires_grad}
    return Snapshot({n: t for n, t in found.weights.items() if n in trained}, found.moments)


def use_full_state_dicts(accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")


def save_run(case: Case, base: str, folder: str, kind: str = "ours", **options) -> Snapshot:
    """Trains, saves, trains on. `kind` is "with base", as before adapters were saved alone, or "peft", as
    accelerate saves them, under PEFT's names and without us."""
    accelerator, model, optimizer = set_up(case, base, **options)
    if kind == "full":
        use_full_state_dicts(accelerator)
    train(accelerator, model, optimizer, 0, TRAINED)
    found = taken(model, optimizer)
    if kind == "peft":
        from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

        plugin = accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, accelerator, model, folder, adapter_only=True)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
    else:
        keep_all = patch("accel_moe.checkpoint.for_accelerate.without_base", lambda model, state: state)
        with keep_all if kind == "with base" else nullcontext():
            accelerator.save_state(folder)
    found.losses = train(accelerator, model, optimizer, TRAINED, CONTINUED)
    accelerator.end_training()
    return found


def load_run(case: Case, base: str, folder: str, kind: str = "ours", **options) -> Snapshot:
    accelerator, model, optimizer = set_up(case, base, **options)
    if kind == "full":
        use_full_state_dicts(accelerator)
    frozen = {n: whole(p) for n, p in model.named_parameters() if not p.requires_grad}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "peft":
            from accelerate import accelerator as patched

            plugin = accelerator.state.fsdp_plugin
            patched.load_fsdp_model(plugin, accelerator, model, folder, adapter_only=True)
            patched.load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
        else:
            accelerator.load_state(folder)
    found = taken(model, optimizer)
    assert all(torch.equal(whole(p), frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)
    found.losses = train(accelerator, model, optimizer, TRAINED, CONTINUED)
    found.told = [str(warning.message) for warning in caught]
    return found


def load_errors(case: Case, base: str, folder: str, adapters: list[dict]) -> list[tuple[str, bool]]:
    """`load_error` for each of these options of an adapter, one after another on the same ranks."""
    return [load_error(case, base, folder, **options) for options in adapters]


def load_error(case: Case, base: str, folder: str, **options) -> tuple[str, bool]:
    """The text of load_state's error on this rank, and whether the model is untouched."""
    accelerator, model, _ = set_up(case, base, **options)
    before = {n: whole(p) for n, p in model.named_parameters()}
    try:
        accelerator.load_state(folder)
    except Exception as error:
        return str(error), all(torch.equal(whole(p), before[n]) for n, p in model.named_parameters())
    return "nothing was raised", False


def train_with_trainer(case: Case, base: str, folder: str, resume=None, max_steps: int = 3) -> Snapshot:
    """Trainer with a PEFT model, a checkpoint each step."""
    from transformers import Trainer

    import accel_moe
    import accel_moe.cpu
    from tests.distributed.trainer_parity import InOrder, trainer_arguments

    accel_moe.cpu.enable()
    model = accel_moe.prepare(wrapped(base), moe_ep_degree=case.ep)
    install()
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "max_steps": max_steps}
    arguments = trainer_arguments(case, folder, model.base_model.model, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=InOrder())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(f"{folder}/saved")
    found = taken(trainer.model, trainer.optimizer)
    found.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found


def bytes_of(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
