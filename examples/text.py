"""Text for the examples: files in, blocks of tokens out.

    folder (default: Python's own standard library) -> files -> training and held-out texts -> blocks [N, seq_len]

Every 16th file is held out. The order of the files is fixed, so each rank and each launch sees the same blocks.
"""

from __future__ import annotations

import os
import random
import sysconfig
from pathlib import Path

import torch
from mistakes import above_zero

SUFFIXES = {".py", ".txt", ".md", ".rst"}
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "node_modules"}
HELD_OUT_EVERY = 16


class Blocks(torch.utils.data.Dataset):
    """Rows of `seq_len` tokens: {"input_ids": [seq_len], "labels": [seq_len]}, int64."""

    def __init__(self, tokens: torch.Tensor, seq_len: int):
        count = len(tokens) // seq_len
        self.rows = tokens[: count * seq_len].view(count, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def add_data_arguments(parser) -> None:
    """Add the data options that every example has."""
    parser.add_argument("--data", metavar="DIR", help="folder of text files (default: Python's standard library)")
    parser.add_argument("--max-megabytes", type=above_zero, default=4.0, help="of text to read (default: %(default)s)")


def read_texts(folder: str | None, max_megabytes: float) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts from the first `max_megabytes` of `folder`, in a shuffled but fixed order.

    Raises:
        ValueError: there is no such folder, or too little text in it.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"{root} is no folder. Give --data a folder of text files.")
    paths = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        paths += [Path(place, name) for name in sorted(names) if Path(name).suffix in SUFFIXES]
    random.Random(0).shuffle(paths)
    train: list[str] = []
    held_out: list[str] = []
    room = max_megabytes * 1e6
    for i, path in enumerate(paths):
        if room <= 0:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        room -= len(text)
        (train if i % HELD_OUT_EVERY else held_out).append(text)
    if not train or not held_out:
        raise ValueError(
            f"{root} has {len(paths)} file(s) ending in {', '.join(sorted(SUFFIXES))}; at least 2 are needed, one to "
            "train on and one to hold out. Give another --data, or split the text into several files."
        )
    return train, held_out


def tokenize(texts: list[str], tokenizer, seq_len: int, max_blocks: int | None = None) -> Blocks:
    """The texts' tokens one after the other, an end-of-text token after each, cut into blocks.

    Raises:
        ValueError: the texts do not fill one block.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in [*ids, *end]], dtype=torch.long)
    if len(tokens) < seq_len:
        raise ValueError(
            f"{len(tokens)} tokens do not fill a block of {seq_len}. Give more text, or a lower --seq-len."
        )
    return Blocks(tokens if max_blocks is None else tokens[: max_blocks * seq_len], seq_len)


def losses_of_rows(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss of each row, in nats per token: logits [B, T, V] and tokens [B, T] to [B]."""
    per_token = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), rows[:, 1:], reduction="none")
    return per_token.mean(dim=1)


def unigram_entropy(blocks: Blocks) -> float:
    """The loss, in nats per token, of a model that knows only how frequent each token is."""
    counts = torch.bincount(blocks.rows.flatten()).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())
