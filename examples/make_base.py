"""Make a small Qwen3-MoE with random weights, and a tokenizer: a base model to train without a download.

    python examples/make_base.py OUT [--data DIR]

OUT becomes a Hub-format folder: config.json, model.safetensors with one tensor per expert, and a byte-level BPE trained
on the text.
"""

from __future__ import annotations

from pathlib import Path

import torch
from mistakes import Parser, at_least, told_in_one_line
from text import add_data_arguments, read_texts
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--vocab-size", type=at_least(1), default=2048)
    parser.add_argument("--layers", type=at_least(1), default=4)
    parser.add_argument("--hidden-size", type=at_least(1), default=128)
    parser.add_argument("--num-experts", type=at_least(2), default=8)
    add_data_arguments(parser)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)

    texts, _ = read_texts(args.data, args.max_megabytes)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=args.num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=2 * args.hidden_size,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the load-balancing loss to the training loss
        router_aux_loss_coef=0.01,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens in the vocabulary")


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it represents any text, and decoding returns it exactly."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


if __name__ == "__main__":
    with told_in_one_line():
        main()
