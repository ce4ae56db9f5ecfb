"""Attribution methods: image and word relevance maps of a CLIP model."""

import lazy_loader

# `__init__.pyi` lists the names. Their modules are imported on first access.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
