from .clip.load import load_clip as load_clip
from .training.module import ClipModule as ClipModule

__version__: str
