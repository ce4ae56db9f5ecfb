"""Fine-tune CLIP on chest radiographs and watch where it looks."""

from importlib.metadata import version

from matex_pl.clip.load import load_clip
from matex_pl.training.module import ClipModule

__version__ = version("matex_pl")

__all__ = ["ClipModule", "__version__", "load_clip"]
