"""Fine-tune CLIP on chest radiographs and watch where it looks."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package that imports a name's module when the name is asked for.

    The command line answers at once because what a command does not use, torch above all, is not imported for it.

    Args:
        package: Name of the package.
        modules: Module below the package for each public name.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return find, lambda: sorted(modules)


def import_all(package: ModuleType) -> None:
    """Import all public names of a package: jsonargparse finds a class by its short name once it is imported."""
    for name in package.__all__:
        getattr(package, name)


if TYPE_CHECKING:
    from matex_pl.clip.load import load_clip
    from matex_pl.training.module import ClipModule
else:
    __getattr__, __dir__ = lazy_names(__name__, {"load_clip": "clip.load", "ClipModule": "training.module"})

__version__ = version("matex_pl")

__all__ = ["ClipModule", "__version__", "load_clip"]
