"""What is imported is declared in `pyproject.toml`."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

# Of Python 3.11, whose `packages_distributions` is the first to know the packages of every wheel.
tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LIBRARY = ["matex_pl", "callbacks"]
SCRIPTS = ["tests", "benchmarks", ".ci"]


def _name(requirement):
    """The name of a distribution, as registries compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def _declared(*extras):
    return {_name(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]}


def _imported(folders, statements):
    """Distributions that the files of some folders import, each with one of the files."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    ours = {path.stem for path in files} | {"matex_pl"}
    distributions = packages_distributions()
    found = {}
    for path in files:
        for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.split(".")[0] for module in modules} - ours - sys.stdlib_module_names:
                found |= {_name(name): str(path) for name in distributions.get(top, [top])[:1]}
    return found


def _needs_an_extra(tree):
    return "Importing this file needs" in (ast.get_docstring(tree) or "")


def _at_import(tree):
    return [] if _needs_an_extra(tree) else tree.body


@pytest.mark.parametrize(
    ("folders", "statements", "extras"),
    [(LIBRARY, _at_import, []), (LIBRARY, ast.walk, EXTRAS.keys() - {"dev"}), (SCRIPTS, ast.walk, EXTRAS)],
    ids=["at import", "in the package", "in tests and scripts"],
)
def test_what_is_imported_is_declared(folders, statements, extras):
    imported = _imported(folders, statements)
    undeclared = {name: imported[name] for name in imported.keys() - _declared(*extras)}
    assert not undeclared, "declare them in pyproject.toml, with the lowest release and the reason"


def test_files_that_need_an_extra_are_imported_by_functions_only():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "matex_pl").rglob("*.py")}
    on_demand = {path.stem for path, tree in trees.items() if _needs_an_extra(tree)}
    at_import = {node.module for tree in trees.values() for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert on_demand
    assert not on_demand & {module.rpartition(".")[2] for module in at_import}


def test_every_floor_has_one():
    """Without a lowest release, a package that is installed already is taken, however old."""
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.keys() - {"dev"} for line in EXTRAS[extra])]
    assert [line for line in lines if ">=" not in line and not line.startswith("matex_pl[")] == []
