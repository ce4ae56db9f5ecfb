from .chestx_det import ChestXDetDataModule as ChestXDetDataModule
from .chexlocalize import CheXlocalizeDataModule as CheXlocalizeDataModule
from .datamodule import ChestXrayDataModule as ChestXrayDataModule
from .manifest import ManifestDataModule as ManifestDataModule
from .mimic import MimicCxrDataModule as MimicCxrDataModule
from .ms_cxr import MsCxrDataModule as MsCxrDataModule
from .nih import NihDataModule as NihDataModule
from .padchest_gr import PadChestGrDataModule as PadChestGrDataModule
from .pair import (
    ImageTextBatch as ImageTextBatch,
)
from .pair import (
    ImageTextPair as ImageTextPair,
)
from .pair import (
    Study as Study,
)
from .pair import (
    StudyBatch as StudyBatch,
)
from .pair import (
    collate as collate,
)
from .phantom.module import PhantomDataModule as PhantomDataModule
from .vindr import VinDrDataModule as VinDrDataModule
