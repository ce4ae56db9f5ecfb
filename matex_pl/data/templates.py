"""Phrases for data sets that have labels and no reports."""

from __future__ import annotations

import numpy as np

TEMPLATES = (
    "{}.",
    "There is {}.",
    "Findings consistent with {}.",
    "Frontal chest radiograph with {}.",
    "Evidence of {}.",
)
"""Sentences around a finding."""

NORMAL = ("No acute cardiopulmonary abnormality.", "Normal chest radiograph.", "The lungs are clear.")
"""Sentences about an image without a finding."""


def label_phrase(finding: str, image: str, seed: int, side: str = "") -> str:
    """A sentence about a finding, drawn from the templates by the seed, the image and the finding.

    Args:
        finding: Finding in the words of a report; empty for a normal image.
        image: Id of the image.
        seed: Random seed.
        side: Side of the patient, to be named before the finding; empty for none.
    """
    rng = np.random.default_rng([seed, *f"{image}/{finding}".encode()])
    if not finding:
        return str(rng.choice(NORMAL))
    phrase = str(rng.choice(TEMPLATES)).format(f"{side} {finding}".strip())
    return phrase[0].upper() + phrase[1:]
