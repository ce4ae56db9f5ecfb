"""Data modules; all give the same records and batches."""

from typing import TYPE_CHECKING

from matex_pl import lazy_names

if TYPE_CHECKING:
    from matex_pl.data.datamodule import ChestXrayDataModule
    from matex_pl.data.manifest import ManifestDataModule
    from matex_pl.data.mimic import MimicCxrDataModule
    from matex_pl.data.ms_cxr import MsCxrDataModule
    from matex_pl.data.nih import NihDataModule
    from matex_pl.data.pair import ImageTextBatch, ImageTextPair, collate
    from matex_pl.data.phantom.module import PhantomDataModule
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ChestXrayDataModule": "datamodule",
            "ManifestDataModule": "manifest",
            "MimicCxrDataModule": "mimic",
            "MsCxrDataModule": "ms_cxr",
            "NihDataModule": "nih",
            "PhantomDataModule": "phantom.module",
            "ImageTextPair": "pair",
            "ImageTextBatch": "pair",
            "collate": "pair",
            # Names in 0.1.
            "Study": "pair",
            "StudyBatch": "pair",
        },
    )

__all__ = [
    "ChestXrayDataModule",
    "ImageTextBatch",
    "ImageTextPair",
    "ManifestDataModule",
    "MimicCxrDataModule",
    "MsCxrDataModule",
    "NihDataModule",
    "PhantomDataModule",
    "collate",
]
