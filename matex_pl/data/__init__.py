"""Data modules; all give the same records and batches."""

from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.manifest import ManifestDataModule
from matex_pl.data.mimic import MimicCxrDataModule
from matex_pl.data.ms_cxr import MsCxrDataModule
from matex_pl.data.nih import NihDataModule
from matex_pl.data.phantom.module import PhantomDataModule
from matex_pl.data.study import Study, StudyBatch, collate

__all__ = [
    "ChestXrayDataModule",
    "ManifestDataModule",
    "MimicCxrDataModule",
    "MsCxrDataModule",
    "NihDataModule",
    "PhantomDataModule",
    "Study",
    "StudyBatch",
    "collate",
]
