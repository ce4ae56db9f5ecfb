"""The picture of a search: scores over lambda_s, lambda_c and tau."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import numpy as np

from matex_pl.tune.choose import Choice


def draw_surface(found: Choice, pairs: int) -> Any:
    """A matplotlib figure: a panel per tau, lambda_s by lambda_c, on one scale; bright is better.

    It shows the K and the shape of the prior of the best setting that was tried. A disc marks the method's own setting,
    where it is on the grid, a star the winner.
    """
    # Importing it takes half a second, which no other command should wait for.
    from matplotlib.figure import Figure

    grid, better = found.grid, found.objective.sign > 0
    shown = next(scored.method for scored in found.best if grid.holds(scored.method))
    scores = found.scores[grid.place(shown)[:2]].numpy()
    columns = min(len(grid.tau), 4)
    rows = -(-len(grid.tau) // columns)
    figure = Figure(figsize=(2.5 * columns + 1.8, 2.4 * rows + 1.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    style: dict[str, Any] = {"vmin": _extreme(np.nanmin, scores), "vmax": _extreme(np.nanmax, scores)}
    style |= {"cmap": "viridis" if better else "viridis_r", "origin": "lower", "aspect": "auto"}
    for place, panel in enumerate(panels):
        if place >= len(grid.tau):
            panel.set_axis_off()
            continue
        image = panel.imshow(scores[..., place], **style)
        panel.set_title(f"tau {grid.tau[place]:g}", fontsize=10)
        # A panel with none below it has no shared labels.
        panel.tick_params(labelbottom=place + columns >= len(grid.tau))
        _tick(panel.set_xticks, grid.lambda_c)
        _tick(panel.set_yticks, grid.lambda_s)
    marks = {"own": (found.own.method, _DISC), "winner": (found.winner.method, _STAR)}
    for label, (method, mark) in marks.items():
        if grid.holds(method) and grid.place(method)[:2] == grid.place(shown)[:2]:
            *_, up, across, place = grid.place(method)
            panels[place].plot(across, up, linestyle="none", clip_on=False, label=label, zorder=3, **mark)
    figure.colorbar(image, ax=list(panels), label=found.objective.title, shrink=0.9)
    figure.suptitle(_title(found, pairs), fontsize=10)
    figure.supxlabel("lambda_c, weight of the consistent gradients", fontsize=10)
    figure.supylabel("lambda_s, strength of the prior", fontsize=10)
    return figure


_DISC = {"marker": "o", "markersize": 14, "markerfacecolor": "white", "markeredgecolor": "black"}
_STAR = {"marker": "*", "markersize": 11, "markerfacecolor": "#e4002b", "markeredgecolor": "black"}


def _extreme(of: Callable[..., Any], scores: np.ndarray) -> float | None:
    return None if np.isnan(scores).all() else float(of(scores))


def _tick(set_ticks: Callable[..., Any], values: Sequence[float]) -> None:
    """Every value where there is room, else every second."""
    places = range(0, len(values), 1 if len(values) < 7 else 2)
    set_ticks(places, [f"{values[place]:g}" for place in places], fontsize=8)


def _title(found: Choice, pairs: int) -> str:
    where = f"a raster of {' x '.join(map(str, found.raster))}" if found.raster else "all pixels"
    lines = [f"{found.objective.title}: {pairs} validation pairs, scored on {where}"]
    for name, scored in (("disc: own", found.own), ("star: winner", found.winner)):
        setting = ", ".join(f"{axis} {short(getattr(scored.method, axis))}" for axis in found.grid.varied)
        off = "" if found.grid.holds(scored.method) else ", off the grid"
        lines.append(f"{name}, {setting}: {number(scored.score)} on all pixels{off}")
    return "\n".join(lines)


def number(value: float | None, sign: str = "") -> str:
    """A score as a text, with its sign if that is `+`; `none` where no study counts."""
    return "none" if value is None or not isfinite(value) else f"{value:{sign}.4f}"


def short(value: float | str) -> str:
    """The value of a setting as a text."""
    return value if isinstance(value, str) else f"{value:g}"
