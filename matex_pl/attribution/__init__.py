"""Methods that say where a CLIP model looked and which words mattered."""

from typing import TYPE_CHECKING

from matex_pl import lazy_names

if TYPE_CHECKING:
    from matex_pl.attribution.base import AttributionMethod
    from matex_pl.attribution.chefer import Chefer
    from matex_pl.attribution.controls import CenterMap, PriorOnly, RandomMap
    from matex_pl.attribution.core.two_tower import Relevance, Tower, Trace, TwoTowerMethod
    from matex_pl.attribution.grad_cam import GradCam
    from matex_pl.attribution.grad_eclip import GradEclip
    from matex_pl.attribution.integrated_gradients import IntegratedGradients
    from matex_pl.attribution.kernel_shap import KernelShap
    from matex_pl.attribution.legrad import LeGrad
    from matex_pl.attribution.m2ib import M2ib
    from matex_pl.attribution.matex import Matex
    from matex_pl.attribution.patch_similarity import PatchSimilarity
    from matex_pl.attribution.rise import Rise
    from matex_pl.attribution.rollout import Rollout
    from matex_pl.attribution.saliency import Saliency
    from matex_pl.attribution.submodular_regions import SubmodularRegions
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AttributionMethod": "base",
            # For methods of one's own.
            "TwoTowerMethod": "core.two_tower",
            "Tower": "core.two_tower",
            "Trace": "core.two_tower",
            "Relevance": "core.two_tower",
            "Chefer": "chefer",
            "CenterMap": "controls",
            "PriorOnly": "controls",
            "RandomMap": "controls",
            "GradCam": "grad_cam",
            "GradEclip": "grad_eclip",
            "IntegratedGradients": "integrated_gradients",
            "KernelShap": "kernel_shap",
            "LeGrad": "legrad",
            "M2ib": "m2ib",
            "Matex": "matex",
            "PatchSimilarity": "patch_similarity",
            "Rise": "rise",
            "Rollout": "rollout",
            "Saliency": "saliency",
            "SubmodularRegions": "submodular_regions",
        },
    )

__all__ = [
    "AttributionMethod",
    "CenterMap",
    "Chefer",
    "GradCam",
    "GradEclip",
    "IntegratedGradients",
    "KernelShap",
    "LeGrad",
    "M2ib",
    "Matex",
    "PatchSimilarity",
    "PriorOnly",
    "RandomMap",
    "Relevance",
    "Rise",
    "Rollout",
    "Saliency",
    "SubmodularRegions",
    "Tower",
    "Trace",
    "TwoTowerMethod",
]
