"""Data modules; all produce the same records and batches."""

import lazy_loader

# `__init__.pyi` lists the names; a module is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
