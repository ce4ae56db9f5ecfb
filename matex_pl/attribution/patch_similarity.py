"""Similarity of each patch alone to the phrase."""

from __future__ import annotations

from typing import ClassVar

from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.clip.encoders import Reads
from matex_pl.maps import full_precision


class PatchSimilarity(TwoTowerMethod):
    """Cosine of each patch with the phrase, from the patch's last token passed alone through the tower's head.

    The token replaces the class token, or is the only token to average or to attend to. CLIP trains the class token
    only, therefore patches need not agree with the phrase.

    Released code: the nearest is MaskCLIP, which leaves out the last block's attention, residual and perceptron. This
    method keeps the tower as deployed.
    """

    supports_text: ClassVar[bool] = False
    reads: ClassVar[Reads] = "blocks"
    cost: ClassVar[str] = "1 forward, and the tower's head once per patch"

    def trace(self, tower: Tower) -> Trace:
        """Run one forward, recording the tokens after the last block."""
        stream = tower.stream()
        with stream.capture():
            embedding = tower.encode()
        tokens = stream.behind[-1]
        patches = tower.tokens_of(tokens)
        others = tokens.shape[1] - patches.shape[1]
        # One copy for each token that is not a patch, and one more: every token that the head reads is the patch.
        alone = patches.flatten(0, 1)[:, None].expand(-1, others + 1, -1)
        with stream.resumed(len(tower.blocks) - 1, alone):
            read = full_precision(tower.encode_stream(1)).unflatten(0, patches.shape[:2])
        return Trace(embedding, lambda direction: Relevance((read * direction[:, None]).sum(-1)))
