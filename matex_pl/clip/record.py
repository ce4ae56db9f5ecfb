"""The meaning of weights, which their shapes do not show: configs compared, described, and carried in a checkpoint."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from matex_pl.clip import towers

_TIMM_CONFIG = "timm/config.json"
_LOCAL = "local-dir:"
# Regularization in training: the trained function does not depend on them.
_TRAINING_ONLY = {"vision_cfg.patch_dropout", "vision_cfg.timm_drop", "vision_cfg.timm_drop_path"}
# Where weights and files came from. The tokens of a sentence identify a tokenizer.
_ORIGINS = {"text_cfg.hf_tokenizer_name", "text_cfg.hf_model_pretrained", "vision_cfg.timm_model_pretrained"}
_ORIGINS |= {"init_logit_scale", "vision_cfg.output_tokens", "text_cfg.output_tokens"}
_PROVENANCE = {"architectures", "dtype", "torch_dtype", "transformers_version"}
_FOLDERS = {"text_cfg.hf_model_name", "vision_cfg.timm_model_name"}


def flat_config(config: Mapping[str, Any], *, with_defaults: bool = False) -> dict[str, Any]:
    """Settings of `{"model_cfg": ..., "preprocess_cfg": ...}` by dotted names, with mean and std.

    Args:
        config: Config in the form of open_clip's `open_clip_config.json`.
        with_defaults: Whether to add open_clip's defaults of missing settings.
    """
    model = config["model_cfg"]
    parts: dict[str, dict[str, Any]] = {"vision_cfg": {}, "text_cfg": {}}
    flat: dict[str, Any] = {}
    if with_defaults:
        parts = {"vision_cfg": asdict(open_clip.CLIPVisionCfg()), "text_cfg": asdict(open_clip.CLIPTextCfg())}
        flat = {"quick_gelu": False, "custom_text": False}
    flat |= {name: value for name, value in model.items() if name not in parts}
    for part, defaults in parts.items():
        flat |= {f"{part}.{name}": value for name, value in {**defaults, **model[part]}.items()}
    flat |= {name: value for name, value in config.get("preprocess_cfg", {}).items() if name in ("mean", "std")}
    if "vision_cfg.image_size" in flat:
        flat["vision_cfg.image_size"] = towers.height_width(flat["vision_cfg.image_size"])
    # JSON has no tuples.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def contradictions(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that the config `given` states and the recorded config contradicts: (recorded, given) by name."""
    before, now = flat_config(recorded, with_defaults=True), flat_config(given)
    return {
        name: (before.get(name), value)
        for name, value in now.items()
        if name not in _ORIGINS | _TRAINING_ONLY
        and before.get(name) != value
        and not (name in _FOLDERS and any(_is_folder(part) for part in (before.get(name), value)))
    }


def differences(given: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two whole configs, stated or by default: (recorded, given) by name."""
    others = {name: pair[::-1] for name, pair in contradictions(recorded, given).items()}
    return contradictions(given, recorded) | others


def _is_folder(name: Any) -> bool:
    return isinstance(name, str) and (name.startswith(_LOCAL) or Path(name).is_absolute())


def listed(pairs: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as text: each name with the recorded value and the given one."""
    return "; ".join(
        f"{name} is {before!r} in the checkpoint and {now!r} here" for name, (before, now) in pairs.items()
    )


def with_training_settings(recorded: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded config with the regularization of training, as patch dropout, that the config `given` states."""
    vision, stated = recorded["model_cfg"]["vision_cfg"], given["model_cfg"]["vision_cfg"]
    changed = {name: value for name, value in stated.items() if f"vision_cfg.{name}" in _TRAINING_ONLY}
    model = {**recorded["model_cfg"], "vision_cfg": {**vision, **changed}}
    return {**recorded, "model_cfg": model}


def assumed(model: nn.Module, config: Mapping[str, Any]) -> str:
    """The parts of a model's meaning that its weights do not show, as text: activation, mean, std, context length."""
    found = {activation_name(part) for part in model.modules()}
    names = [name for name in ("QuickGELU", "GELU", "tanh GELU") if name in found]
    preprocess, text = config["preprocess_cfg"], config["model_cfg"]["text_cfg"]
    mean, std = (", ".join(f"{value:.4g}" for value in preprocess[name]) for name in ("mean", "std"))
    activation = " and ".join(names) or "no GELU"
    return f"activation {activation}, mean ({mean}), std ({std}), {text.get('context_length', 77)} tokens of context"


def activation_name(module: nn.Module) -> str:
    """Name of an activation of open_clip, torch or timm; empty for any other module."""
    name = type(module).__name__
    is_tanh = name == "GELUTanh" or (name == "GELU" and getattr(module, "approximate", "none") == "tanh")
    return "tanh GELU" if is_tanh else name if name in ("QuickGELU", "GELU") else ""


# --- files of tokenizers and towers, for checkpoints that are read without the folder or the hub


def model_files(clip: Any) -> dict[str, Tensor]:
    """Files without which a `Clip` cannot be built again, as uint8 tensors by name; none for open_clip's own models.

    They are the tokenizer's files, `config.json` of a Hugging Face text tower, and that of a timm trunk from a folder.
    """
    if clip.files:
        return dict(clip.files)
    tokenizer, tower = getattr(clip.tokenizer, "tokenizer", None), towers.text_tower(clip.model)
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if isinstance(tower, HFTextEncoder):
            tower.config.save_pretrained(folder)
        files |= {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    trunk = str(clip.config["model_cfg"]["vision_cfg"].get("timm_model_name") or "")
    if trunk.startswith(_LOCAL):
        files[_TIMM_CONFIG] = (Path(trunk.removeprefix(_LOCAL)) / "config.json").read_bytes()
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items() if data}


@contextmanager
def unpacked(config: dict[str, Any], files: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """Context with a config whose tokenizer and towers are read from `model_files`, unpacked in a temporary folder.

    Raises:
        ValueError: The name of a file leads out of the folder.
    """
    if not files:
        yield config
        return
    local = deepcopy(config)
    vision, text = local["model_cfg"]["vision_cfg"], local["model_cfg"]["text_cfg"]
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            if name != _TIMM_CONFIG and Path(name).name != name:
                raise ValueError(f"the file name {name!r} leads out of its folder")
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data.cpu().numpy().tobytes())
        if any("token" in name for name in files):
            text["hf_tokenizer_name"] = folder
        if "config.json" in files and text.get("hf_model_name"):
            text["hf_model_name"] = folder
        if _TIMM_CONFIG in files:
            vision["timm_model_name"] = f"{_LOCAL}{Path(folder) / 'timm'}"
        yield local


def tower_differences(clip: Any, files: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """Settings of a Hugging Face text tower or timm trunk that differ from `model_files`: (recorded, own) by name."""
    found: dict[str, tuple[Any, Any]] = {}
    own = model_files(clip).get(_TIMM_CONFIG) if _TIMM_CONFIG in files else None
    if own is not None:
        first, second = (json.loads(data.cpu().numpy().tobytes()) for data in (files[_TIMM_CONFIG], own))
        parts = [config.get("model_args") or {} for config in (first, second)]
        keys = sorted(parts[0].keys() | parts[1].keys())
        pairs = {f"timm.{name}": (parts[0].get(name), parts[1].get(name)) for name in keys}
        pairs["timm.architecture"] = (first.get("architecture"), second.get("architecture"))
        found = {name: (before, now) for name, (before, now) in pairs.items() if before != now}
    tower = towers.text_tower(clip.model)
    if not isinstance(tower, HFTextEncoder) or "config.json" not in files:
        return found
    before = json.loads(files["config.json"].cpu().numpy().tobytes())
    now = json.loads(tower.config.to_json_string(use_diff=True))
    names = {name for name in before.keys() | now.keys() if name not in _PROVENANCE and not name.startswith("_")}
    return found | {
        f"{tower.config.model_type}.{name}": (before.get(name), now.get(name))
        for name in sorted(names)
        if before.get(name) != now.get(name)
    }


def recorded_config(checkpoint: Any) -> dict[str, Any] | None:
    """Config in a checkpoint of `matex fit`; None for any other content."""
    try:
        config = json.loads(checkpoint["hyper_parameters"]["name"])
        return config if {"model_cfg", "preprocess_cfg"} <= config.keys() else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def recorded_lora(checkpoint: Any) -> dict[str, Any] | None:
    """Settings of the adapters in a checkpoint of `matex fit`; None without adapters and for any other content."""
    settings = checkpoint.get("hyper_parameters") if isinstance(checkpoint, Mapping) else None
    lora = settings.get("lora") if isinstance(settings, Mapping) else None
    return dict(lora) if isinstance(lora, Mapping) else None
