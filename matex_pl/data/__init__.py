"""Data modules; all give the same records and batches."""

import lazy_loader

# The names are listed in `__init__.pyi`, and their modules imported when they are asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
