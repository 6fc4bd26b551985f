"""The config of a model folder, the class it names, and the model on meta that it describes.

Nothing is asked on the terminal, and the folder's own code runs only if that was allowed.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from accel_moe.errors import HubFormatError


def meta_model(folder: Path, *, tied: bool = True, trust_remote_code: bool = False) -> Any:
    """The model that `folder`'s config describes, on meta: parameters have shapes and no memory.

    With `tied` false its word embeddings are not tied, whatever the config says (`untied_config`).

    Raises:
        HubFormatError: there is no config, its architecture is not in this transformers, or it needs code of the
            folder's own that may not be run.
    """
    import transformers

    config = read_config(folder, trust_remote_code)
    if not tied:
        config = type(config).from_dict(untied_config(folder, trust_remote_code))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # fp32, whatever the config says: a tensor loaded into it keeps its bf16 or fp32 values
        if found := model_class(folder, config, trust_remote_code):
            return found._from_config(config, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's config. Raises HubFormatError: it has none, or transformers cannot read it."""
    import transformers

    if not (folder / "config.json").is_file():
        raise HubFormatError(f"{folder} has no config.json. Give the folder of the model that training started from.")
    try:
        # never None: transformers would then ask on the terminal
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if not trust_remote_code and _own_code(folder):
            raise HubFormatError(
                f"{folder} is of an architecture that transformers {transformers.__version__} lacks, and has code of "
                f"its own, {', '.join(_own_code(folder))}, which was not run. Read it, then add --trust-remote-code."
            ) from None
        raise HubFormatError(
            f"transformers {transformers.__version__} cannot read {folder / 'config.json'}: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """An error in a line; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _auto_map(folder: Path) -> dict[str, str]:
    """The classes that a folder's own code defines: {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    return {auto: name for auto, name in found.items() if isinstance(name, str)}


def _own_code(folder: Path) -> list[str]:
    return sorted({f"{name.rpartition('.')[0]}.py" for name in _auto_map(folder).values()})


def model_class(folder: Path, config: Any, trust_remote_code: bool) -> Any | None:
    """The class that the config names, the folder's own if that may run; None leaves the choice to transformers."""
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    if trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        for auto, reference in _auto_map(folder).items():
            if auto.startswith("AutoModel") and reference.rpartition(".")[2] in names:
                return get_class_from_dynamic_module(reference, str(folder))
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def untied_config(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The folder's config.json with `tie_word_embeddings` false wherever the model would read that it is true."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def untie(config: Any, part: dict[str, Any]) -> None:
        if getattr(config, "tie_word_embeddings", None):
            part["tie_word_embeddings"] = False
        for name in getattr(config, "sub_configs", None) or {}:
            inner = getattr(config, name, None)
            if inner is not None and getattr(inner, "tie_word_embeddings", None):
                if not isinstance(part.get(name), dict):
                    part[name] = {}
                untie(inner, part[name])

    untie(read_config(folder, trust_remote_code), document)
    return document
