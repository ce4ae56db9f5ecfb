"""Maps as pictures: panels and contact sheets of pairs, for the callbacks and for `matex explain`."""

from matex_pl.explain.pairs import (
    attribute_batch,
    compare_methods,
    draw_panels,
    explain_batch,
    explain_pair,
    pair_batch,
)

__all__ = ["attribute_batch", "compare_methods", "draw_panels", "explain_batch", "explain_pair", "pair_batch"]
