"""Fine-tune CLIP on chest radiographs and watch where it looks."""

from importlib.metadata import version

import lazy_loader

# Lazy imports keep the command line fast: modules, torch above all, are imported only when a command uses them.
# `__init__.pyi` lists the names.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("matex_pl")
