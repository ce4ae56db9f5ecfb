"""The model card of an export: the training behind a model, and its last scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from matex_pl import __version__
from matex_pl.clip.model import Clip
from matex_pl.clip.record import assumed
from matex_pl.files import MARK

CARD = "README.md"
_USES = {
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")""",
    "CLIPModel": """from transformers import AutoProcessor, CLIPModel

model = CLIPModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")""",
    "SiglipModel": """from transformers import AutoProcessor, SiglipModel

model = SiglipModel.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
# Texts need padding="max_length".""",
}
# Settings of a training that its checkpoint records, next to the config of the model.
_NOT_LISTED = {"name", "pretrained"}


def model_card(
    clip: Clip, kind: str, name: str, checkpoint: Mapping[str, Any], notes: Sequence[str], files: Sequence[str]
) -> str:
    """Text of a model card, Markdown under a YAML head.

    Args:
        clip: The exported model.
        kind: `open_clip`, `CLIPModel` or `SiglipModel`.
        name: Name of the folder.
        checkpoint: Content of the checkpoint of `matex fit`; empty for any other model.
        notes: Notes of the export, one sentence each.
        files: Names of the exported files.
    """
    library = "open_clip" if kind == "open_clip" else "transformers"
    own: dict[str, Any] = {MARK: {"version": __version__, "files": sorted([*files, CARD])}}
    tags = ["clip", "chest-x-ray", MARK]
    data = ModelCardData(library_name=library, pipeline_tag="zero-shot-image-classification", tags=tags, **own)
    height, width = clip.image_size
    parts = [
        f"# {name}",
        f"A CLIP model for chest radiographs, exported by `matex export` of matex_pl {__version__}.",
        f"## Use\n\n```python\n{_USES[kind].format(folder=name)}\n```",
        "\n".join(f"- {note}" for note in notes),
        f"## Model\n\nInput of {height} x {width} pixels; {assumed(clip.model, clip.config)}.",
        _training(checkpoint),
        _scores(checkpoint),
        "## Limits\n\nThe model is for research. It is no medical device.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def earlier_files(folder: Path) -> set[str]:
    """Names of the files that an earlier export wrote into a folder, by its model card; empty for any other folder."""
    try:
        recorded = ModelCard.load(folder / CARD).data.to_dict().get(MARK)
    # The card is a file of anybody, with any content.
    except Exception:
        return set()
    files = recorded.get("files") if isinstance(recorded, dict) else None
    return {str(name) for name in files} if isinstance(files, list) else set()


def _training(checkpoint: Mapping[str, Any]) -> str:
    if not checkpoint:
        return "## Training\n\nThe model was exported as it was loaded. No checkpoint records its training."
    training = checkpoint.get("training") or {}
    data = training.get("data") or {}
    rows = {"epochs begun": checkpoint.get("epoch", 0) + 1, "steps": checkpoint.get("global_step")}
    rows |= {"seed": training.get("seed"), "resize mode of the images": checkpoint.get("resize_mode")}
    rows |= {f"version of {name}": number for name, number in (training.get("versions") or {}).items()}
    settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name not in _NOT_LISTED}
    rows |= {"data module": data.get("class")}
    rows |= {f"`data.{name}`": value for name, value in (data.get("settings") or {}).items()}
    rows |= {f"`model.{name}`": value for name, value in settings.items()}
    return "## Training\n\n" + _table("setting", {name: _shown(value) for name, value in rows.items()})


def _scores(checkpoint: Mapping[str, Any]) -> str:
    scores = (checkpoint.get("training") or {}).get("scores") or {}
    if not checkpoint:
        return ""
    if not scores:
        return "## Last scores\n\nThe checkpoint records no scores."
    return "## Last scores\n\n" + _table("score", {f"`{name}`": f"{value:.4g}" for name, value in scores.items()})


def _table(head: str, rows: Mapping[str, str]) -> str:
    lines = (f"| {name} | {value} |" for name, value in rows.items() if value)
    return "\n".join([f"| {head} | value |", "|---|---|", *lines])


def _shown(value: Any) -> str:
    """A setting as text in a table; empty for None and for long lists. Of a path only the last part is shown."""
    if isinstance(value, (list, tuple)):
        shown = [_shown(part) for part in value]
        return ", ".join(shown) if len(shown) <= 20 and all(shown) else ""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(part)}" for name, part in value.items() if _shown(part))[:200]
    if not isinstance(value, (str, int, float, bool)):
        return ""
    text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
    return " ".join(text.split()).replace("|", "\\|")[:200]
