"""The option that a misspelt name is meant for.

A key that nothing reads turns expert parallelism off in silence: `ep_degre`, `moe-ep-degree`, `ep_size` from another
project, `ACCELMOE_EP_DEGREE`. This module splits a name into words and compares it with our options. It matches a name
that differs only in case, separators and prefixes; a name one or two letters away; and another project's name for
expert parallelism.

    meant_in_our_section    a key of parallelism_config: the strictest, because only accelerate and we read it
    meant_elsewhere         a key of another section of accelerate's file
    meant_in_environment    a variable: only names close to ours, because every program's variables are there
    asks_for_ep             a variable that asks for expert parallelism in another project

Pure: text in, an option's name or None out. config.py decides whether to raise or to warn.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

EP = "moe_ep_degree"

_PREFIXES = ("accel", "accelmoe", "accelerate", "parallelism", "config", "fsdp", "dynamo", "fp8", "trainer", "hf")
"""Words that people put before a key: names of the package and of the sections."""

_EP_NAMES = (
    "ep", "epsize", "epdegree", "epworldsize", "epdim", "eprank", "etp", "etpsize", "enableep", "useep", "moeep",
    "moeepsize", "expertparallel", "expertparallelism", "expertparallelsize", "expertparalleldegree", "expertdegree",
    "expertmodelparallelsize", "moeexpertparallelsize", "expertmodelparalleldegree", "expertparallelworldsize",
    "expertparallelismsize", "expertparallelismdegree", "experttensorparallelsize", "enableexpertparallel",
    "expertsize", "expertshards", "numexpertparallel", "moeexpertparalleldegree", "moeparallelsize",
)  # fmt: skip
"""Other projects' names for expert parallelism (Megatron, DeepSpeed, vLLM, SGLang, torchtitan, NeMo), squeezed."""

_ENGINES = ("deepspeed_config", "megatron_lm_config")
"""Sections of engines with expert parallelism of their own: its names in there belong to the engine."""

_NOT_A_TYPO = ("mode", "node", "more", "move", "model", "code", "accelerator")
"""Words one letter from ours at the start of other programs' variables."""


def words_of(name: str) -> list[str]:
    """moe-epDegree, MOE_EP_DEGREE and moe.ep degree: [moe, ep, degree]."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word for word in re.split(r"[\W_]+", apart.lower()) if word]


def meant_in_our_section(key: str, options: Sequence[str]) -> str | None:
    """The option that a key of parallelism_config is meant for; None for a foreign key. Not for accelerate's keys."""
    words = _without_prefixes(words_of(key))
    if (found := _nearest_option("".join(words), options, bare=True)) is not None:
        return found
    if _is_ep(words) or {"ep", "etp", "expert", "experts"} & set(words):
        return EP
    if any(word.startswith("moe") for word in words[:1]):
        return most_like("_".join(words), options)
    return EP if words_of(key)[:1] in (["accel"], ["accelmoe"]) else None


def meant_elsewhere(section: str, key: str, options: Sequence[str]) -> str | None:
    """The option that a key of another section (or of the top level: "") is meant for; else None."""
    words = _without_prefixes(words_of(key))
    engine = section in _ENGINES
    if words[:1] == ["moe"] and not engine:
        return most_like("_".join(words), options)
    if (found := _nearest_option("".join(words), options, bare=not engine)) is not None:
        return found
    return EP if not engine and _is_ep(words) else None


def meant_in_environment(variable: str, options: Sequence[str]) -> str | None:
    """The option that a variable is meant for that sets none; else None."""
    words = words_of(variable)
    rest = _without_prefixes(words)
    squeezed = "".join(words)
    for option in options:
        bare = option.removeprefix("moe_").replace("_", "")
        if _distance(squeezed, f"accelmoe{bare}", 2) <= 2:
            return option
    if any(word in _NOT_A_TYPO for word in words[:2]):
        return None
    if _begins_like_ours(words):
        return most_like("_".join(rest), options)
    if (found := _nearest_option("".join(rest), options, bare=False)) is not None:
        return found
    ep_of_moe = rest[:1] == ["moe"] and _is_ep(rest[1:])
    return EP if ep_of_moe or (words[:2] == ["parallelism", "config"] and _is_ep(rest)) else None


def asks_for_ep(variable: str) -> bool:
    """Whether a variable is another project's way, or a script's own, to ask for expert parallelism."""
    return "".join(words_of(variable)) in _EP_NAMES


def _without_prefixes(words: list[str]) -> list[str]:
    while len(words) > 1 and words[0] in _PREFIXES:
        words = words[1:]
    if words and words[0].startswith("accelmoe"):
        words = ["moe" + words[0].removeprefix("accelmoe"), *words[1:]]
    return words[1:] if words[:2] == ["moe", "moe"] else words  # accel_moe_moe_...


def _begins_like_ours(words: list[str]) -> bool:
    """Whether a name begins with ACCEL_MOE, ACCELMOE or ACCELERATE_MOE, or one slip away from them."""
    starts = {words[0], "".join(words[:2])} if words else set()
    slips = [start for start in starts if min(_distance(start, own, 1) for own in ("accelmoe", "acceleratemoe")) <= 1]
    return bool(slips) or any(start.startswith(("accelmoe", "acceleratemoe")) for start in starts)


def _is_ep(words: list[str]) -> bool:
    squeezed = "".join(words)
    if "expert" in squeezed and any(part in squeezed for part in ("parallel", "degree", "mesh", "shard")):
        return True
    long = (name for name in _EP_NAMES if len(name) >= 10)
    return squeezed in _EP_NAMES or any(_distance(squeezed, name, 2) <= 2 for name in long)


def _nearest_option(squeezed: str, options: Sequence[str], *, bare: bool) -> str | None:
    """The option within a slip or two of a squeezed name, with its moe_ or (bare) without it."""
    for option in options:
        full = option.replace("_", "")
        for name in (full, full.removeprefix("moe")) if bare else (full,):
            allowed = 2 if len(name) >= 8 and (bare or len(name) >= 10) else 1
            if _distance(squeezed, name, allowed) <= allowed:
                return option
    return None


def most_like(name: str, options: Sequence[str]) -> str:
    """The option with the closest spelling, at any distance."""
    words = _without_prefixes(words_of(name))
    if (found := _nearest_option("".join(words), options, bare=True)) is not None:
        return found
    if {"ep", "etp", "expert", "experts"} & set(words):
        return EP
    return difflib.get_close_matches("_".join(words), options, n=1, cutoff=0)[0]


def _distance(a: str, b: str, most: int) -> int:
    """Insertions, deletions, changes and swaps of neighbours between two words; most + 1 if there are more."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    before, row = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row, earlier = row, [i], before
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, earlier[j - 2] + 1)
            row.append(cost)
        before = last
    return row[-1]
