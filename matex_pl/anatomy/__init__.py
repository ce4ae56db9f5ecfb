"""From a radiologist's phrase to the anatomical regions that it names, and to their spatial prior."""

from matex_pl.anatomy.laterality import named_side, side_words, swap_sides
from matex_pl.anatomy.parser import ParsedPhrase, parse_phrase
from matex_pl.anatomy.prior import prior_map, prior_maps
from matex_pl.anatomy.pruning import prune_phrase
from matex_pl.anatomy.regions import Region, load_regions

__all__ = [
    "ParsedPhrase",
    "Region",
    "load_regions",
    "named_side",
    "parse_phrase",
    "prior_map",
    "prior_maps",
    "prune_phrase",
    "side_words",
    "swap_sides",
]
