"""The rooms of the package and who may look into whom."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import matex_pl

PACKAGE = Path(matex_pl.__file__).parent
# Each imports only from its left; leaves may be used by all and import only leaves.
ORDER = ["data", "anatomy", "clip", "attribution", "training", "metrics", "viewer", "explain", "evaluation"]
ORDER += ["benchmark", "tune", "roar", "commands", "callbacks", "cli"]
# Each of the three experiments stands on `evaluation` alone.
EXPERIMENTS = {"benchmark", "tune", "roar"}
LEAVES = {"arguments", "console", "files", "maps", "visualization", "report"}
MOST_LOOSE_FILES = 7


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("matex_pl.")}


def _rooms() -> list[tuple[str, Path]]:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"]
    files += (PACKAGE / "callbacks").glob("*.py")
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in files]


@pytest.mark.parametrize(("room", "path"), _rooms(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_module_imports_only_from_its_left(room, path):
    allowed = LEAVES | {room}
    if room not in LEAVES:
        allowed |= set(ORDER[: ORDER.index(room)])
    if room in EXPERIMENTS:
        allowed -= EXPERIMENTS - {room}
    assert _imports(path) <= allowed


def test_few_files_are_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_LOOSE_FILES


def test_callbacks_exist_once(monkeypatch):
    monkeypatch.syspath_prepend(str(PACKAGE.parent))
    monkeypatch.delitem(sys.modules, "callbacks", raising=False)
    with pytest.raises(ImportError, match=r"matex_pl\.callbacks"):
        importlib.import_module("callbacks")
