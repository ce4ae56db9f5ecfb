"""Each patch on its own beside the phrase."""

from __future__ import annotations

from typing import ClassVar

from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
from matex_pl.maps import full_precision


class PatchSimilarity(TwoTowerMethod):
    """Cosine of each patch with the phrase, the patch's last token taken through the tower's head alone.

    The token stands where the class token does, or is all that there is to average or to attend to. CLIP trains the
    class token only, so that nothing makes the patches agree with the phrase.

    Released code: MaskCLIP, the nearest, leaves the last block's attention, residual and perceptron out; here the tower
    stays as it is deployed.
    """

    supports_text: ClassVar[bool] = False
    cost: ClassVar[str] = "1 forward, and the tower's head once per patch"

    def trace(self, tower: Tower) -> Trace:
        """One forward, recording the tokens behind the last block."""
        stream = tower.stream()
        with stream.capture():
            embedding = tower.encode()
        tokens = stream.behind[-1]
        patches = tower.tokens_of(tokens)
        others = tokens.shape[1] - patches.shape[1]
        # As many copies as there are tokens beside the patches: whichever of them the head reads, it is the patch.
        alone = patches.flatten(0, 1)[:, None].expand(-1, others + 1, -1)
        with stream.resumed(len(tower.blocks) - 1, alone):
            read = full_precision(tower.encode_stream(1)).unflatten(0, patches.shape[:2])
        return Trace(embedding, lambda direction: Relevance((read * direction[:, None]).sum(-1)))
