"""Reading of weights from files, without running code: checks, and errors that name the weights."""

from __future__ import annotations

import errno
import json
import logging
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from matex_pl.clip import towers
from matex_pl.clip.archive import Inert, module_state, read_archive
from matex_pl.clip.low_rank import merge_adapters
from matex_pl.clip.record import recorded_config, recorded_lora

log = logging.getLogger(__name__)

# `ClipModule` stores the model under this prefix, and further tensors under others.
PREFIX = "clip.model."
# Entries of OpenAI's archives, next to the weights.
_OPENAI_KEYS = {"input_resolution", "context_length", "vocab_size"}
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|base_model\.model)\.")
# Keys under which training code saves a state dict, and names that it gives to averaged weights.
_WRAPPING = ("state_dict", "model_state_dict", "model", "module", "net")
_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_ema_state_dict")
_IS_AVERAGED = re.compile(r"(^|[._])ema([._]|$)")
# Attributes that training code gives to a whole model. They decide between equal prefixes.
_HOLDERS = {"module", "model", "clip", "net", "clip_model", "backbone", "_orig_mod"}
# First names of a CLIP's weights. Other first names belong to other modules, as a classifier.
_CLIP_PARTS = {"visual", "text", "transformer", "token_embedding", "positional_embedding", "ln_final"}
_CLIP_PARTS |= {"text_projection", "logit_scale", "logit_bias"}
_ADAPTERS = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module|ia3_\w+)\b")


@dataclass
class Weights:
    """Content of a file of weights.

    Args:
        path: Path of the file.
        state: Weights of the model by their plain names.
        config: Config of the model, if `matex fit` wrote the file.
        checkpoint: Whole content of the file, if `matex fit` wrote it, with its adapters merged.
        is_openai: Whether the file has the entries of OpenAI's archives.
        others: Names of tensors of other modules, which `fit_names` has left out.
    """

    path: str
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    checkpoint: dict[str, Any] = field(default_factory=dict)
    is_openai: bool = False
    others: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Tensor]:
        """Files of the tokenizer and the towers in the checkpoint; see `model_files`."""
        return dict(self.checkpoint.get("model_files") or {})


def why_unreadable(error: BaseException) -> str:
    """One-line reason why a file was not read, with the code that the file would run."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        # A position outside of the file.
        return "it is truncated"
    return f"it would run {code[1]}" if code else first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type if the message is empty; at most 400 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


@contextmanager
def reading_checkpoint(path: str) -> Iterator[None]:
    """Context for reading a checkpoint of `matex fit`: an error that does not name the file becomes `no_checkpoint`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Any other error.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint at {path!r}. `matex fit` writes them below its log folder.")
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and path in str(error):
            raise
        raise no_checkpoint(path, error) from error


def no_checkpoint(path: str | Path, error: BaseException) -> ValueError:
    """Error for an unreadable checkpoint, with the file and the code or weights at fault."""
    return ValueError(f"{path} is no checkpoint of `matex fit`: {why_unreadable(error)}")


def plain_name(key: str) -> str:
    """Name of a weight without the prefixes of `torch.compile`, DDP and PEFT."""
    while (shorter := _WRAPPERS.sub(r"\1", key).removeprefix("module.")) != key:
        key = shorter
    own = key.removeprefix(PREFIX)
    return key if own == key else PREFIX + plain_name(own)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their plain names."""
    return {plain_name(key): value for key, value in state.items()}


def read_content(path: str) -> Any:
    """Content of a file of `torch.save` or safetensors, or of an index of such files; no code of a file is run.

    Raises:
        FileNotFoundError: A file of the index does not exist.
        ValueError: The file is a TorchScript archive, which holds code.
    """
    if path.endswith(".safetensors"):
        return load_file(path)
    if path.endswith(".index.json"):
        return _read_shards(Path(path))
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(
            f"{path} is a TorchScript archive, the form of OpenAI's own downloads. It holds code and is not read here. "
            "If you trust the file, convert it: torch.save(torch.jit.load(FILE, 'cpu').state_dict(), 'weights.pt')."
        )
    # Mapped: the state of the optimizer in a checkpoint is not read.
    return torch.load(path, "cpu", weights_only=True, mmap=is_zip)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Weights of all files that an index of the Hugging Face libraries names."""
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which leads out of its folder. Get the model's original files.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(
                f"{index} names {name}, which is missing. Put all files of the model in one folder."
            )
        state |= read_content(str(index.parent / name))
    return state


def read_weights(path: str) -> Weights:
    """Weights of a file, without running code from it.

    The weights may be in a wrapping dict, next to other content. A TorchScript archive is read for its tensors. Objects
    of classes, such as hyper-parameters, are left out, and one logged line names them.

    Raises:
        FileNotFoundError: A file that an index names does not exist.
        ValueError: The file holds no weights or several models, needs code for its weights, or holds adapters of PEFT.
    """
    try:
        return _read(path, _read_tensors(path))
    except Exception as error:
        if isinstance(error, (OSError, ValueError)) and path in str(error):
            raise
        raise ValueError(
            f"{path} is no plain state dict ({why_unreadable(error)}). Only .safetensors and files that "
            "`torch.load(..., weights_only=True)` accepts are read, because any other could run code."
        ) from error


def read_checkpoint(path: str) -> Weights:
    """Weights of a checkpoint of `matex fit`, with the config of their model; no code of the file is run.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is no checkpoint of `matex fit`.
    """
    with reading_checkpoint(path):
        weights = _read(path, read_content(path))
        if weights.config is None:
            raise ValueError(
                "it does not record the model of its weights. Give the model's name, and the file as pretrained."
            )
        return weights


def _read_tensors(path: str) -> Any:
    """Content of a file, with inert objects instead of objects that only code of the file could build."""
    try:
        with warnings.catch_warnings():
            # torch warns that its own reader may fail. If it does, the reader below follows.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return read_content(path)
    except Exception as error:
        try:
            content, skipped = read_archive(path)
        except Exception:
            raise error from None
        if isinstance(content, Inert):
            content, skipped = module_state(content), []
        # The record of `matex fit` has plain types only.
        if recorded_config(content) is not None or not _states(content):
            raise
    if skipped:
        more = f" and {len(skipped) - 3} more" * (len(skipped) > 3)
        log.info(f"{path} also holds objects of {', '.join(skipped[:3])}{more}. They are left out, and no code is run.")
    return content


def _states(content: Any, place: tuple[str, ...] = ()) -> dict[str, Mapping[str, Tensor]]:
    """State dicts in a file's content, by the keys that lead to them, joined by dots."""
    if not isinstance(content, Mapping) or len(place) > 3:
        return {}
    inner: dict[str, Mapping[str, Tensor]] = {}
    for key in _WRAPPING + _AVERAGED:
        inner |= _states(content.get(key), (*place, key))
    if inner or not any(isinstance(value, Tensor) for value in content.values()):
        return inner
    return {".".join(place): content}


def _read(path: str, content: Any) -> Weights:
    states = _states(content)
    if not states:
        raise ValueError("it holds no tensors, or no state dict under a known key")
    place, *more = _without_averages(path, list(states))
    if more:
        raise ValueError(
            f"{path} holds several models, under {' and '.join(map(repr, [place, *more]))}. Save one of them in a file "
            "of its own."
        )
    # Extra states of modules are no tensors.
    state = {str(key): value for key, value in states[place].items() if isinstance(value, Tensor)}
    adapters, lora = [key for key in state if _ADAPTERS.search(key)], recorded_lora(content)
    if adapters and lora:
        state = merge_adapters(state, lora)
        content = {**content, "hyper_parameters": {**content["hyper_parameters"], "lora": None}}
    elif adapters:
        raise ValueError(
            f"{path} holds adapters of PEFT in {_some(adapters)}. Merge them before saving: `merge_and_unload()`."
        )
    state = plain_state(state)
    ours = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    config = recorded_config(content) if ours else None
    if config:
        return Weights(path, ours, config, dict(content, state_dict=state))
    return Weights(path, state)


def fit_names(weights: Weights, model: nn.Module) -> None:
    """Give weights of another training the names that a model has.

    The prefix that leads to the most names of the model is removed. Tensors of other modules, and the entries of
    OpenAI's archives, are left out. In the layout of transformers, only the prefix is removed. Weights of `matex fit`
    and layouts that open_clip converts stay as they are.

    Raises:
        ValueError: Several prefixes lead to equally many names.
    """
    own, state = model.state_dict(), weights.state
    counts = Counter(prefix for key in state for prefix in _prefixes(key) if key.removeprefix(prefix) in own)
    most = max(counts.values(), default=0)
    if weights.config is not None:
        return
    if 4 * most < len(own):
        found = {match[1] for key in state if (match := re.match(r"(.*?)(?:text|vision)_model\.", key))}
        if len(found) == 1:
            (prefix,) = found
            weights.others = [key for key in state if not key.startswith(prefix)]
            weights.state = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
        return
    prefix = _one_prefix([prefix for prefix, count in counts.items() if count == most], weights, own)
    firsts = {name.split(".")[0] for name in own}
    # UniMed-CLIP holds open_clip's text tower of Hugging Face under another name.
    text = "text." if "text" in firsts else "text_encoder."
    weights.state, weights.others = {}, []
    for key, value in state.items():
        name = re.sub("^text_encoder\\.", text, key.removeprefix(prefix))
        if not key.startswith(prefix) or name.split(".")[0] not in _CLIP_PARTS | _OPENAI_KEYS | firsts:
            weights.others.append(key)
        elif name in _OPENAI_KEYS:
            weights.is_openai = True
        else:
            weights.state[name] = value


def _prefixes(key: str) -> list[str]:
    """Beginnings of a dotted name, up to each of its dots: `a.b.c` gives an empty text, `a.` and `a.b.`."""
    return ["", *(key[: match.end()] for match in re.finditer(r"\.", key))]


def _one_prefix(prefixes: list[str], weights: Weights, own: Mapping[str, Tensor]) -> str:
    """The prefix of the weights to read, among prefixes that lead to equally many names of the model."""
    state, chosen = weights.state, _without_averages(weights.path, prefixes)
    first = chosen[0]
    # A training may hold a model twice, as `self.model` and as a part of another module.
    if all(
        torch.equal(state[first + name], state[prefix + name])
        for prefix in chosen
        for name in own
        if first + name in state and prefix + name in state
    ):
        return first
    holders = [prefix for prefix in chosen if set(prefix.split(".")[:-1]) <= _HOLDERS]
    if len(holders) == 1:
        return holders[0]
    raise ValueError(
        f"{weights.path} holds several models, under {' and '.join(map(repr, chosen))}. Save one of them in a file of "
        "its own."
    )


def _without_averages(path: str, places: Sequence[str]) -> list[str]:
    """Places of weights without averages of a training's steps; one logged line names the averages."""
    chosen = [place for place in places if not _IS_AVERAGED.search(place)] or list(places)
    averages = [place for place in places if place not in chosen]
    if averages:
        log.info(
            f"{path} holds weights under {chosen[0]!r}, and averages of them under "
            f"{' and '.join(map(repr, averages))}. The weights under {chosen[0]!r} are read."
        )
    return chosen


def are_openai(weights: Weights) -> bool:
    """Whether weights are OpenAI's: by their entries, or matrices of half precision next to embeddings of single.

    OpenAI published its matrices, and nothing else, in half precision, with a logit scale of 100. Weights that were
    trained further, or with mixed precision, have other values in their matrices.
    """
    if weights.is_openai:
        return True
    state = weights.state
    matrices = [value for key, value in state.items() if key.endswith(("attn.in_proj_weight", "text_projection"))]
    embedding, scale = state.get("token_embedding.weight"), state.get("logit_scale")
    if weights.config or not matrices or embedding is None or scale is None or abs(float(scale.exp()) - 100) > 0.1:
        return False
    return all(_is_half(part) for part in matrices) and not _is_half(embedding)


def _is_half(values: Tensor) -> bool:
    return values.dtype == torch.float16 or torch.equal(values, values.half().to(values.dtype))


def load_weights(model: nn.Module, weights: Weights, name: str) -> None:
    """Load weights into a model, with position embeddings of images interpolated to its size.

    Raises:
        ValueError: Keys are missing, extra or of another shape, or the text positions have another length.
    """
    refuse_context(model, weights)
    state = _interpolated(weights, model)
    with tempfile.TemporaryDirectory() as folder:
        # open_clip's own loader resizes position embeddings and converts older layouts; it only takes files.
        plain = Path(folder) / "weights.pt"
        torch.save(state, plain)
        try:
            keys = open_clip.load_checkpoint(model, str(plain), strict=False)
            problem = misfit(keys.missing_keys, keys.unexpected_keys) if keys else ""
        except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
            problem = key_misfit(model.state_dict(), state) or first_line(error)
            raise _no_fit(weights, problem, name) from error
    if problem:
        raise _no_fit(weights, problem, name)
    if weights.others:
        log.info(f"{weights.path} also holds {_some(weights.others)}, which belong to other modules and are left out.")


def _no_fit(weights: Weights, problem: str, name: str) -> ValueError:
    """Error for weights that do not fit a model, which names the keys."""
    problem += f"; of other modules: {_some(weights.others)}" * bool(weights.others)
    return ValueError(
        f"{weights.path} does not fit the model {short(name)}: {problem}. Give the model that the weights belong to."
    )


def key_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Text on keys that are missing in `state`, extra, or of another shape than in `own`; empty if all fit."""
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return misfit([key for key in own if key not in state], [key for key in state if key not in own], shapes)


def misfit(missing: Sequence[str], extra: Sequence[str], shapes: Sequence[str] = ()) -> str:
    """Text on missing keys, extra keys and other shapes: the count and the first five of each; empty without any."""
    parts = {"missing": missing, "extra": extra, "of another shape": shapes}
    return "; ".join(f"{kind}: {_some(keys)}" for kind, keys in parts.items() if keys)


def torch_misfit(error: BaseException) -> str:
    """`misfit` of torch's error for weights that do not fit a model; its first line for any other error."""
    parts = dict(re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: (.*)", str(error)))
    names = {kind: re.findall(r'"([^"]+)"', text) for kind, text in parts.items()}
    shapes = re.findall(r"size mismatch for ([^:\s]+):", str(error))
    return misfit(names.get("Missing", []), names.get("Unexpected", []), shapes) or first_line(error)


def _some(keys: Sequence[str]) -> str:
    return f"{len(keys)} key{'s' * (len(keys) > 1)} ({', '.join(keys[:5])}{', ...' * (len(keys) > 5)})"


def refuse_context(model: Any, weights: Weights) -> None:
    """Raise ValueError if the text positions have another length than the model's: open_clip would interpolate them."""
    own, names = model.state_dict(), ("positional_embedding", "text.positional_embedding")
    before = next((weights.state[name] for name in names if name in weights.state), None)
    now = next((own[name] for name in names if name in own), None)
    if before is not None and now is not None and len(before) != len(now):
        raise ValueError(
            f"{weights.path} holds positions of {len(before)} tokens of text, the model has {len(now)}. Positions of "
            f"words are not interpolated. Set text_cfg.context_length to {len(before)}."
        )


def _interpolated(weights: Weights, model: Any) -> dict[str, Tensor]:
    """Weights with a timm tower's position embeddings interpolated to the model; open_clip interpolates its own."""
    state, trunk = weights.state, getattr(model.visual, "trunk", None)
    key = "visual.positional_embedding" if trunk is None else "visual.trunk.pos_embed"
    old, new = state.get(key), model.state_dict().get(key)
    if old is None or new is None or old.shape == new.shape:
        return state
    grid, prefix = towers.patch_grid(model.visual), getattr(trunk, "num_prefix_tokens", 1)
    patches = old.shape[-2] - prefix
    if isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"{key} holds positions of {patches} patches, which is no square raster and cannot be interpolated to the "
            f"model's {grid}. Set image_size to the height and width of the training."
        )
    if weights.config is None and patches != grid[0] * grid[1]:
        log.info(
            f"{weights.path} holds positions of {isqrt(patches)} x {isqrt(patches)} patches. They are interpolated to "
            f"the model's {grid[0]} x {grid[1]}."
        )
    if trunk is None:
        return state
    return state | {key: resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)}


def refuse_nan(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError with the names of the weights if some hold NaN or Inf."""
    bad = [key for key, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{short(source)} holds NaN or Inf in {', '.join(bad[:3])} ({len(bad)} tensors). Use earlier weights."
        )


def short(name: str) -> str:
    """A name or path in quotes; the text of a config is shortened."""
    return repr(f"{name[:77]}..." if name.lstrip().startswith("{") and len(name) > 80 else name)
