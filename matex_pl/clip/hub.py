"""Access to the files of a model on the Hugging Face hub or on disk, with a clear error for each failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import huggingface_hub.constants
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX

from matex_pl.clip.weights import first_line, short, torch_misfit


@contextmanager
def reading_files(name: str, tag: str | None, text_cfg: Mapping[str, Any] | None) -> Iterator[None]:
    """Context for open_clip to read the files of a model. If the hub does not answer, only the local cache is used.

    Args:
        name: Name of the model, as for `load_clip`.
        tag: Tag of the weights to download.
        text_cfg: Text config; its `hf_...` entries name files of the hub.

    Raises:
        ImportError: The text tower or the tokenizer needs transformers.
        ValueError: A folder holds no weights that fit and are readable without running code.
        ConnectionError: A file is not in the local cache and cannot be downloaded.
    """
    constants: Any = huggingface_hub.constants
    uses_hub = bool(tag) or name.startswith(HF_HUB_PREFIX) or any(key.startswith("hf_") for key in text_cfg or ())
    was_offline = constants.HF_HUB_OFFLINE
    # The hub's client retries for half a minute per file, and reads the switch from the environment only at import.
    is_offline = constants.HF_HUB_OFFLINE = was_offline or (uses_hub and not _hub_answers())
    try:
        yield
    except (ImportError, OSError, RuntimeError, UnpicklingError) as error:
        if "transformers" in str(error) and find_spec("transformers") is None:
            raise ImportError(
                f"The text tower or the tokenizer of {short(name)} needs one more package: pip install 'matex_pl[hf]'."
            ) from error
        if name.startswith(LOCAL_DIR_PREFIX) and isinstance(error, FileNotFoundError):
            folder = Path(name.removeprefix(LOCAL_DIR_PREFIX))
            lacks = f"it lacks {Path(error.filename).name}" if error.filename else first_line(error)
            state = lacks if folder.is_dir() else "there is no such folder"
            raise FileNotFoundError(
                f"{name} names no model: {state}. Give a folder with open_clip_config.json, or one of transformers."
            ) from error
        if name.startswith(LOCAL_DIR_PREFIX) and isinstance(error, (RuntimeError, UnpicklingError)):
            raise ValueError(
                f"{name} holds no weights that fit and are readable without running code ({torch_misfit(error)}). Give "
                "a checkpoint file as `pretrained`, or the path of the folder's JSON to start from random weights."
            ) from error
        if uses_hub and isinstance(error, (OSError, RuntimeError)):
            state = f"could not be loaded: {first_line(error)}"
            if is_offline:
                state = "are not in the local cache, and the hub does not answer or HF_HUB_OFFLINE is set"
            raise ConnectionError(
                f"The files of {short(name)}{f' (tag {tag!r})' if tag else ''} {state}. Connect once, or pass a "
                "checkpoint file as `pretrained`, or a folder that holds the model as local-dir:folder."
            ) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _hub_answers() -> bool:
    """Whether the hub answers within seconds to the client that downloads its files."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    # By version, the client is requests or httpx, whose errors have no common class.
    except Exception:
        return False
    return True
