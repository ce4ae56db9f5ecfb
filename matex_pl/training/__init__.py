"""Fine-tuning: the LightningModule, its loss, scores and checkpoints."""

from matex_pl.training.module import ClipModule, load_module

__all__ = ["ClipModule", "load_module"]
