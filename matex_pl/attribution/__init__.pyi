from .base import AttributionMethod as AttributionMethod
from .chefer import Chefer as Chefer
from .controls import (
    CenterMap as CenterMap,
)
from .controls import (
    PriorOnly as PriorOnly,
)
from .controls import (
    RandomMap as RandomMap,
)
from .core.two_tower import (
    Relevance as Relevance,
)
from .core.two_tower import (
    Tower as Tower,
)
from .core.two_tower import (
    Trace as Trace,
)
from .core.two_tower import (
    TwoTowerMethod as TwoTowerMethod,
)
from .dense_similarity import DenseSimilarity as DenseSimilarity
from .grad_cam import GradCam as GradCam
from .grad_eclip import GradEclip as GradEclip
from .integrated_gradients import IntegratedGradients as IntegratedGradients
from .kernel_shap import KernelShap as KernelShap
from .legrad import LeGrad as LeGrad
from .m2ib import M2ib as M2ib
from .matex import Matex as Matex
from .nib import Nib as Nib
from .rise import Rise as Rise
from .rollout import Rollout as Rollout
from .saliency import Saliency as Saliency
from .submodular_regions import SubmodularRegions as SubmodularRegions
from .word_regions import WordRegions as WordRegions
