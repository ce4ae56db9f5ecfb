"""Synthetic chest radiographs with exact boxes and the phrases that describe them."""

import lazy_loader

# `__init__.pyi` lists the names; a module is imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
