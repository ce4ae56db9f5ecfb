"""The picture of a search: scores over lambda_s, lambda_c and tau."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from matex_pl.attribution import Matex
from matex_pl.tune.choose import Choice


def draw_surface(found: Choice, pairs: int) -> Figure:
    """A matplotlib figure: a panel per tau, lambda_s by lambda_c, on one scale; bright is better.

    It shows the K and the shape of the prior of the best setting that was tried. A disc marks the method's own setting,
    where it is on the grid, a star the winner.
    """
    grid, better = found.grid, found.objective.sign > 0
    shown = next(scored.method for scored in found.best if grid.holds(scored.method))
    scores = found.scores[grid.place(shown)[:2]].numpy()
    columns = min(len(grid.tau), 4)
    rows = -(-len(grid.tau) // columns)
    width = max(2.5 * columns + 1.8, 7)
    figure = Figure(figsize=(width, max(2.4 * rows + 1.9, 4.8)), layout="constrained")
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
        if _is_on(found, method, shown):
            *_, up, across, place = grid.place(method)
            panels[place].plot(across, up, linestyle="none", clip_on=False, label=label, zorder=3, **mark)
    figure.colorbar(image, ax=list(panels), label=found.objective.title, shrink=0.9)
    figure.suptitle(_title(found, shown, pairs, int(12 * width)), fontsize=10)
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


def _title(found: Choice, shown: Matex, pairs: int, letters: int) -> str:
    """What was measured on what, and both settings; lines of up to so many letters."""
    grid, unit = found.grid, {"image": "pixels", "text": "words"}[found.objective.side]
    where = f"a raster of {' x '.join(map(str, found.raster))}" if found.raster else f"all {unit}"
    several = [name for name in ("grad_layers", "prior_shape") if name in grid.varied]
    panels = [f"panels at the best {' and '.join(several)}"] if several else []
    lines = [", ".join([f"{found.objective.title}: {pairs} validation pairs on {where}", *panels])]
    for name, scored in (("disc: own", found.own), ("star: winner", found.winner)):
        setting = ", ".join(f"{axis} {short(getattr(scored.method, axis))}" for axis in grid.varied)
        away = "" if _is_on(found, scored.method, shown) else ", not on these panels"
        lines.append(f"{name}, {setting}: {number(scored.score)} on all {unit}{away}")
    return "\n".join(fill(line, letters) for line in lines)


def _is_on(found: Choice, method: Matex, shown: Matex) -> bool:
    """The setting was tried, with the K and the shape of the one that is shown."""
    return found.grid.holds(method) and found.grid.place(method)[:2] == found.grid.place(shown)[:2]


def number(value: float | None, sign: str = "") -> str:
    """A score as a text, with its sign if that is `+`; `none` where no study counts."""
    return "none" if value is None or not isfinite(value) else f"{value:{sign}.4f}"


def short(value: float | str) -> str:
    """The value of a setting as a text."""
    return value if isinstance(value, str) else f"{value:g}"
