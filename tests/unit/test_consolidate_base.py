"""What consolidate takes from a base besides its weights, and where it finds a base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.exports import assert_same_tensors, make_trained, one_line_error, read_weights, run, write_checkpoint
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="w0")


@pytest.mark.core
def test_all_that_a_tokenizer_and_a_processor_save_is_copied(tmp_path):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    first = tokenizer()
    first.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    saved = first.save_pretrained(base)
    second = tokenizer()
    second.chat_template = {"default": "{{ messages }}", "other": "{{ other }}"}
    second.save_pretrained(base / "qformer_tokenizer")  # as a processor saves its second tokenizer
    for name in ("preprocessor_config.json", "audio_tokenizer_config.json", "video_preprocessor_config.json"):
        (base / name).write_text("{}")
    for name in ("source.spm", "bpe.codes", "modeling_own.py"):
        (base / name).write_text("x")
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text("x")
    expected = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file() and "safetensors" not in p.name}
    assert run(checkpoint, tmp_path / "out", base) == 0
    out = tmp_path / "out"
    assert expected <= {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert saved and AutoTokenizer.from_pretrained(out).chat_template == first.chat_template
    assert AutoTokenizer.from_pretrained(out / "qformer_tokenizer").chat_template == second.chat_template


@pytest.mark.core
def test_what_is_left_behind_is_listed_and_would_have_misled(tmp_path, capsys):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    for name in ("README.md", "pytorch_model.bin", "adapter_config.json", "trainer_state.json", ".gitattributes"):
        (base / name).write_text("{}")
    (base / "checkpoint-3").mkdir()
    (base / "checkpoint-3" / "config.json").write_text("{}")
    (base / "checkpoint-3" / "tokenizer_config.json").write_text("{}")
    assert run(checkpoint, tmp_path / "out", base) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not copied"))
    assert line.endswith("README.md, adapter_config.json, checkpoint-3/, pytorch_model.bin, trainer_state.json")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"adapter_config.json", "trainer_state.json", "checkpoint-3"}
    capsys.readouterr()
    shutil.rmtree(tmp_path / "out")
    assert run(checkpoint, tmp_path / "out", tmp_path / "expected") == 0
    assert "not copied" not in capsys.readouterr().out


def in_cache(base, cache, repo="some/model"):
    """The cache as huggingface_hub lays it out, with the whole of `base`; returns the model's folder."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for file in base.iterdir():
        blob = folder / "blobs" / file.name
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The Hub's cache, in a process that has no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.core
def test_a_hub_id_that_is_whole_in_the_cache_needs_no_network(tmp_path, offline):
    checkpoint, base, expected = make_trained(tmp_path, "qwen3_moe")
    folder = in_cache(base, offline)
    shutil.rmtree(base)
    assert run("--verify", "--keep-extra", checkpoint, tmp_path / "out", "some/model") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    assert run(checkpoint, tmp_path / "again", folder) == 0  # the cache's folder itself will do, too


def test_a_hub_id_that_is_not_whole_in_the_cache_names_what_is_missing(tmp_path, offline, capsys):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    folder = in_cache(base, offline)
    gone = sorted((folder / "snapshots" / ("a" * 40)).glob("model-*"))[1]
    gone.unlink()
    line = one_line_error(capsys, checkpoint, tmp_path / "out", "some/model")
    assert "not whole" in line and gone.name in line and "hf download some/model" in line


def base_with_own_code(base):
    """A base of an architecture that transformers lacks. Its code leaves a mark when it is run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(base)
    mark = base.parent / "code_was_run"
    (base / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_moe'\n"
    )
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changed = {"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changed))
    torch.manual_seed(5)
    return write_checkpoint(LlamaForCausalLM(config), base.parent / "checkpoint"), mark


def test_code_of_the_bases_own_is_run_when_the_option_says_so_and_nobody_is_asked(tmp_path, capsys, monkeypatch):
    import transformers.dynamic_module_utils

    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    checkpoint, mark = base_with_own_code(tmp_path / "base")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", tmp_path / "base")
    assert "configuration_own.py" in line and "--trust-remote-code" in line
    assert not asked and not mark.exists()
    assert run("--trust-remote-code", "--verify", checkpoint, tmp_path / "out", tmp_path / "base") == 0
    assert not asked and mark.exists() and (tmp_path / "out" / "modeling_own.py").exists()


def test_a_known_architecture_that_also_brings_code_needs_no_option(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    checkpoint, base, expected = make_trained(tmp_path, "qwen3_moe")
    own = {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | own))
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert not asked
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("prefix, inner", [("checkpoint-", ""), ("checkpoint_", "checkpoints")])
def test_the_folder_of_a_run_names_the_checkpoint_in_it(tmp_path, capsys, prefix, inner):
    checkpoint, base, _ = make_trained(tmp_path, "qwen3_moe")
    (tmp_path / "run" / inner).mkdir(parents=True)
    shutil.copytree(checkpoint, tmp_path / "run" / inner / f"{prefix}20")
    line = one_line_error(capsys, tmp_path / "run", tmp_path / "out", base)
    assert f"such as {tmp_path / 'run' / inner}/{prefix}20" in line


def test_whole_weights_need_no_consolidating(tmp_path, capsys):
    _, base, _ = make_trained(tmp_path, "qwen3_moe")
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "whole")
    for number in range(9):
        (tmp_path / "whole" / f"a{number}.txt").write_text("x")  # a listing of the first few would not show it
    assert "need no consolidating" in one_line_error(capsys, tmp_path / "whole", tmp_path / "out", base)
