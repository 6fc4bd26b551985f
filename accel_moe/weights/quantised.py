"""Refusals of quantised bases: trained weights cannot be written into tensors that mean something only with scales.

A quantised base says so in its config, in the dtype of its tensors, or in the tensors that lie beside them.
transformers loads some of them dequantised, and then a trained weight would be cast to the stored dtype while the scale
that belongs to it stays as it was, or is left out. An integer buffer that no scale belongs to is none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accel_moe.errors import HubFormatError, first_few
from accel_moe.weights.safetensors import HubTensor

_PLAIN_FLOATS = {"F64", "F32", "F16", "BF16", "C64"}
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_CONFIG_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_PACKED = ("_packed", "_blocks", "_quantized", "_fp4", "_fp8")
_SCALES = ("_scale", "_scales", "_scale_inv", "_scale_2", "_scale_inv_2", "_zero_point", "_amax", "_absmax")
_SCALES += (".absmax", ".nested_absmax", ".quant_map", ".scale", ".scales", ".scale_inv", ".SCB", ".zero_point")
_SCALES_OF_OWNER = ("scales", "qzeros", "SCB", "weight_format", "absmax")
_FIX = (
    "Trained weights cannot be written so. Give a dequantised copy of the base: load it dequantised, in bfloat16, with "
    "transformers, model.save_pretrained(COPY), the tokenizer too, and give COPY as the base."
)


def refuse_quantised_config(folder: Path, name: str) -> None:
    """Raises HubFormatError when the config says that the weights are quantised."""
    for file in _CONFIG_FILES:
        if (folder / file).is_file():
            raise HubFormatError(f"{name} is quantised: it has {file}. {_FIX}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # meta_model says what is wrong with it
    for part in _parts(config):
        for key in _CONFIG_KEYS:
            found = part.get(key)
            if isinstance(found, dict) and found:
                method = found.get("quant_method") or found.get("quant_algo") or found.get("format") or "?"
                raise HubFormatError(f"{name} is quantised ({method}): its config.json has {key}. {_FIX}")


def _parts(config: Any) -> Iterable[dict[str, Any]]:
    """A config and the configs inside it."""
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _parts(value)


def scaled_tensors(base: Mapping[str, HubTensor]) -> dict[str, list[str]]:
    """Key → the keys of its scales, for each tensor that is not made of plain floats and has some."""
    found = {}
    for key, tensor in base.items():
        if tensor.dtype in _PLAIN_FLOATS:
            continue
        if scales := [name for name in _scale_names(key) if name in base and name != key]:
            found[key] = scales
    return found


def _scale_names(key: str) -> list[str]:
    owner, dot, leaf = key.rpartition(".")
    stems = [leaf] + [leaf.removesuffix(packed) for packed in _PACKED if leaf.endswith(packed)]
    names = [f"{owner}{dot}{stem}{scale}" for stem in stems for scale in _SCALES]
    if leaf in ("weight", "qweight"):
        names += [f"{owner}{dot}{scale}" for scale in _SCALES_OF_OWNER]
    return names


def refuse_quantised_tensors(base: Mapping[str, HubTensor], trained: Mapping[str, bool], name: str) -> None:
    """Raises HubFormatError, by key, when a trained tensor would be written in a dtype that carries scales.

    `trained` has the keys that parameters become; true where the parameter is a floating one. What training does not
    touch (MTP layers) may be quantised: it is copied as it is, or left out.
    """
    scaled = scaled_tensors(base)
    wrong = []
    for key, floating in trained.items():
        if key not in base or base[key].dtype in _PLAIN_FLOATS:
            continue
        if floating or key in scaled or base[key].torch_dtype.is_floating_point:
            wrong.append(_describe(base[key], scaled.get(key, [])))
    if wrong:
        raise HubFormatError(f"{name} is quantised: {first_few(wrong)}. {_FIX}")


def refuse_scaled_tensors(base: Mapping[str, HubTensor], name: str) -> None:
    """The same for a base that could not be planned at all: if tensors have scales, then that is why."""
    refuse_quantised_tensors(base, dict.fromkeys(scaled_tensors(base), False), name)


def _describe(tensor: HubTensor, scales: list[str]) -> str:
    beside = f", with {scales[0].rpartition('.')[2]} beside it" if scales else ""
    return f"{tensor.key} is {tensor.dtype}{beside}, expected F32, BF16 or F16"
