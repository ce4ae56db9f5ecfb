"""Fine-tune CLIP on chest radiographs and watch where it looks."""

from importlib.metadata import version

import lazy_loader

# The command line answers at once because what a command does not use, torch above all, is not imported for it: the
# names are listed in `__init__.pyi`, and their modules imported when they are asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = version("matex_pl")
