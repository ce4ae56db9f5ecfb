from .cache import phantom_cache as phantom_cache
from .findings import FINDINGS as FINDINGS
from .image import (
    Phantom as Phantom,
)
from .image import (
    PlacedFinding as PlacedFinding,
)
from .image import (
    draw_phantom as draw_phantom,
)
from .image import (
    phantom_masks as phantom_masks,
)
from .phrases import write_phrase as write_phrase
