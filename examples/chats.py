"""Conversations for train_trl.py, made from text files: the question is a piece of a file, the answer the next piece.

    texts -> conversations(...)      [{"messages": [user, assistant]}]                  for SFT
          -> preferences(...)        [{"prompt", "chosen", "rejected"}]                 for DPO
          -> tasks(...)              [{"prompt", "expected"}] and reward(...)           for GRPO

Answers differ in length, so each rank has another number of tokens that count in the loss. For data of your own, load
a dataset with the same columns.
"""

from __future__ import annotations

import random

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
"""For a base model whose tokenizer has none. TRL takes the tokens between `generation` marks for the assistant's."""


def questions_and_answers(texts: list[str], seq_len: int) -> list[tuple[str, str]]:
    """Pieces of each text in turn, each cut in two: `seq_len` characters together, and so at most as many tokens."""
    generator = random.Random(0)
    pairs = []
    for text in texts:
        for start in range(0, len(text) - seq_len + 1, seq_len):
            cut = start + int(seq_len * generator.uniform(0.25, 0.75))
            pairs.append((text[start:cut], text[cut : start + seq_len]))
    if len(pairs) < 2:
        raise ValueError(
            f"{len(texts)} text(s) give {len(pairs)} conversation(s) of {seq_len} characters; at least 2 are needed. "
            "Give more text, or a lower --seq-len."
        )
    return pairs


def conversations(texts: list[str], seq_len: int) -> list[dict]:
    return [
        {"messages": [*user(question), *assistant(answer)]}
        for question, answer in questions_and_answers(texts, seq_len)
    ]


def preferences(texts: list[str], seq_len: int) -> list[dict]:
    """The piece that follows is preferred to the one that follows the next question."""
    pairs = questions_and_answers(texts, seq_len)
    others = [answer for _, answer in [*pairs[1:], pairs[0]]]
    return [
        {"prompt": user(question), "chosen": assistant(answer), "rejected": assistant(other)}
        for (question, answer), other in zip(pairs, others)
    ]


def tasks(texts: list[str], seq_len: int) -> list[dict]:
    return [
        {"prompt": user(question), "expected": answer} for question, answer in questions_and_answers(texts, seq_len)
    ]


def reward(completions: list[list[dict]], expected: list[str], **_) -> list[float]:
    """The share of a completion's characters that the expected answer has, too: from 0 to 1."""
    texts = [messages[0]["content"] for messages in completions]
    return [sum(c in set(answer) for c in text) / max(len(text), 1) for text, answer in zip(texts, expected)]


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def assistant(content: str) -> list[dict]:
    return [{"role": "assistant", "content": content}]
