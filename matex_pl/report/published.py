"""Published results of the paper, and of zero-shot phrase grounding."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

SOURCE = "Imran, Lee and Lee, tables 1 and 2: MS-CXR, CLIP ViT-B/32"

# Mean and deviation of tables 1 and 2 on MS-CXR with OpenAI's ViT-B/32, by the row names of this benchmark.
PUBLISHED: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "image": {
        "GradCam": {"drop": (2.76, 0.03), "increase": (12.64, 0.46), "roar": (3.54, 0.80)},
        "Saliency": {"drop": (0.81, 0.01), "increase": (35.08, 0.44), "roar": (25.46, 1.35)},
        "KernelShap": {"drop": (2.37, 0.04), "increase": (10.24, 0.68), "roar": (12.67, 1.02)},
        "Rise": {"drop": (3.94, 0.03), "increase": (7.28, 0.44), "roar": (16.79, 0.76)},
        "Chefer": {"drop": (1.87, 0.02), "increase": (21.44, 0.46), "roar": (24.42, 1.19)},
        "M2ib": {"drop": (0.55, 0.01), "increase": (45.92, 0.70), "roar": (38.7, 0.86)},
        "MATEX, as printed": {"drop": (0.51, 0.03), "increase": (47.55, 1.10), "roar": (37.9, 0.79)},
    },
    "text": {
        "GradCam": {"drop": (2.26, 0.04), "increase": (36.24, 0.54), "roar": (11.07, 0.62)},
        "Saliency": {"drop": (3.35, 0.03), "increase": (18.88, 0.54), "roar": (15.79, 0.92)},
        "KernelShap": {"drop": (2.40, 0.05), "increase": (34.12, 0.77), "roar": (14.28, 1.09)},
        "Rise": {"drop": (1.16, 0.02), "increase": (57.2, 0.65), "roar": (12.09, 1.52)},
        "Chefer": {"drop": (2.93, 0.03), "increase": (28.08, 0.34), "roar": (9.11, 0.60)},
        "M2ib": {"drop": (2.28, 0.04), "increase": (35.48, 0.69), "roar": (16.31, 0.75)},
        "MATEX, as printed": {"drop": (1.91, 0.06), "increase": (50.07, 0.46), "roar": (16.98, 0.66)},
    },
}


@cache
def grounding_figures() -> dict[str, Any]:
    """Published figures of phrase grounding as in `grounding.yaml`: `zero_shot` by protocol, and `supervised`."""
    text = Path(__file__).with_name("grounding.yaml").read_text(encoding="utf-8")
    figures: dict[str, Any] = yaml.safe_load(text)
    return figures
