"""Attribution methods by the names of their shipped settings."""

from __future__ import annotations

import re
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from matex_pl import attribution
from matex_pl.arguments import argument_names, fault, import_all, nearest
from matex_pl.attribution.base import AttributionMethod
from matex_pl.files import CONFIG_FOLDER, read_yaml

METHOD_FOLDER = CONFIG_FOLDER / "methods"


def method_names() -> list[str]:
    """Names of the shipped settings, for example `m2ib`."""
    return sorted(path.stem for path in METHOD_FOLDER.glob("*.yaml"))


def method_path(name: str) -> Path:
    """YAML file of a method: a path, or the name of a shipped file (`m2ib`, `methods/m2ib.yaml`).

    Raises:
        ValueError: If there is no such file; the message lists the shipped ones.
    """
    shipped = METHOD_FOLDER / f"{name.removeprefix('configs/').removeprefix('methods/').removesuffix('.yaml')}.yaml"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    known = f"Use one of {', '.join(method_names())}, the path of a class, or a YAML file."
    raise ValueError(f"There is no method {name!r}. {renamed(name) or known}")


def renamed(text: str) -> str:
    """Advice for a text that names a method of an earlier version, by its settings or its class; else empty."""
    if not re.search(r"\b(PatchSimilarity|patch_similarity)\b", text):
        return ""
    return (
        "It is a variant of DenseSimilarity now. Use dense_similarity with `variant: patch`, on a command line "
        "`--method dense_similarity --method.variant patch`."
    )


def load_method(method: AttributionMethod | str) -> AttributionMethod:
    """Attribution method built from its YAML (see `method_path`), or the given method unchanged.

    Raises:
        ValueError: If there is no such YAML, or the YAML does not describe a method.
    """
    if isinstance(method, AttributionMethod):
        return method
    path = method_path(method)
    described = read_yaml(path)
    kind = described.get("class_path")
    if not isinstance(kind, str):
        raise ValueError(
            f"{path} does not describe an attribution method. Write `class_path` and `init_args`, as in m2ib.yaml."
        )
    import_all(attribution)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AttributionMethod, "method", required=True)
    try:
        return parser.instantiate(parser.parse_object({"method": described})).method
    except ArgumentError as error:
        found = fault(str(error))
        name = found.name.removeprefix("method").lstrip(".")
        if not name:
            way_out = renamed(kind) or f"Use one of {', '.join(method_names())}"
            rule = f"its class_path {kind!r} is no attribution method. {way_out}"
        elif found.is_unknown:
            known = list(argument_names(getattr(attribution, kind.rpartition(".")[2], object)))
            rule = f"{kind} has no setting {name!r}.{nearest(name, known)}"
        else:
            rule = f"{name} must be {found.rule or 'another value'}, got {found.value!r}"
        raise ValueError(f"{path} does not describe an attribution method: {rule.removesuffix('.')}.") from error


def shipped_methods() -> dict[str, AttributionMethod]:
    """Methods of the shipped settings by class name: MATEX first, the controls last."""
    from matex_pl.attribution.controls import Control
    from matex_pl.attribution.matex import Matex

    methods = [load_method(name) for name in method_names()]
    methods.sort(key=lambda method: (not isinstance(method, Matex), isinstance(method, Control)))
    return {type(method).__name__: method for method in methods}
