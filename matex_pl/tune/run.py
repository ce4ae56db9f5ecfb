"""`matex tune`: settings of MATEX for a model and its images, selected on validation pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matex_pl.anatomy.prior import PriorShape
from matex_pl.arguments import check_positive
from matex_pl.attribution import AttributionMethod, Matex
from matex_pl.attribution.core.capture import borrowed, count_blocks
from matex_pl.attribution.core.fill import check_fill
from matex_pl.attribution.shipped import load_method
from matex_pl.clip.device import find_device
from matex_pl.clip.load import load_trained
from matex_pl.data.datamodule import ChestXrayDataModule
from matex_pl.data.pair import ImageTextPair
from matex_pl.evaluation.pairs import choose_pairs, model_inputs, prepare_data, read_pairs
from matex_pl.evaluation.provenance import provenance
from matex_pl.evaluation.store import weight_hash
from matex_pl.files import check_outputs
from matex_pl.tune.objective import Objective, boxless_objectives, find_objective
from matex_pl.tune.outcome import OUTPUTS, describe, report, write_files
from matex_pl.tune.search import AXES, attribute_pairs, choose_setting, make_grid, score_setting

log = logging.getLogger(__name__)

LAMBDA_S = [1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5]
LAMBDA_C = [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
TAU = [0.0, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0]


def tune_matex(
    data: ChestXrayDataModule,
    ckpt_path: str,
    out: str,
    method: AttributionMethod | str | None = None,
    objective: str = "pointing_game",
    lambda_s: list[float] = LAMBDA_S,
    lambda_c: list[float] = LAMBDA_C,
    tau: list[float] = TAU,
    grad_layers: list[int | Literal["all"]] | None = None,
    flow: list[Literal["sum", "rollout", "relevance"]] | None = None,
    flow_layers: list[int | Literal["all"]] | None = None,
    consistency_of: list[Literal["attention", "relevance"]] | None = None,
    prior_shape: list[PriorShape] | None = None,
    num_pairs: int = 256,
    batch_size: int = 32,
    raster: int = 56,
    device: str = "auto",
    seed: int = 0,
) -> str:
    """Find lambda_s, lambda_c and tau of MATEX on validation pairs, and score the winner once on test pairs.

    The components are computed once, and every setting is fused from them. Image maps are compared on a raster, and the
    ten best settings again at every pixel. The winner is the best of these and of the method's own setting. An
    objective that runs the model (confidence, curves) scores all settings at every pixel. Of equal settings the nearest
    to the method's own wins. A setting without effect is not varied, and the text names the reason.

    The command writes

    - `tuned.yaml`, which `--method` and the callbacks read
    - `surface.png` and `surface.svg`, the scores over lambda_s, lambda_c and tau
    - `tune.json`, all scores with their provenance

    Some objectives compare with other maps: `prompt_sensitivity` with those of another pair's phrase,
    `side_sensitivity` with right and left exchanged, and `sanity` with shuffled weights. `sanity` computes the
    components once more for each block of the towers. `insertion` and `deletion` use the gain, which ranks settings
    like the AUC.

    Args:
        data: Data module; settings are tuned on its validation split, and the winner is scored on its test split.
        ckpt_path: Checkpoint of `matex fit`.
        out: Output folder.
        method: A Matex whose other settings stay fixed, `Matex.recommended()` by default: the name of a shipped
            setting, a YAML file, or a class.
        objective: Metric of the benchmark by which settings are ranked. Compared on the raster are `pointing_game`,
            `cnr`, `miou`, `energy_pointing_game`, `relevance_rank_accuracy`, `border_mass` and `mean_map_mass` (lower
            is better), `prompt_sensitivity`, `side_sensitivity`, `sanity`, and `outside_thorax_mass` if the data module
            has a thorax or masks. At a threshold, as `iou/0.3`: `iou`, `acc50` and `ap50`. With forwards of the model
            for each setting: `confidence_drop`, `confidence_increase`, `confidence_drop@50`, `confidence_increase@50`,
            `top20_removal`, `insertion` and `deletion`. These fill with the mean image or with a named fill, as
            `top20_removal/blur`. For the words: `text_` before the first five of these, before `mean_map_mass` or
            before `sanity`.
        lambda_s: Strengths of the prior to try, at least 1.
        lambda_c: Weights of the consistent gradients to try.
        tau: Temperatures of the attention flow to try.
        grad_layers: Numbers of blocks with gradients to try, or `all`; the method's own by default.
        flow: Attention flows to try; the method's own by default.
        flow_layers: Numbers of blocks of the flow to try, or `all`; the method's own by default.
        consistency_of: Rows of the consistency to try; the method's own by default.
        prior_shape: Shapes of the prior to try; the method's own by default.
        num_pairs: Number of pairs of each split, only pairs with boxes if the objective needs boxes; -1 for all.
        batch_size: Number of pairs per batch.
        raster: Number of raster points on the longer side, at most one per pixel.
        device: `cpu`, `cuda`, `mps`, or `auto`, which uses a GPU of CUDA if there is one.
        seed: Random seed of the drawn pairs, the shuffled weights and the bootstrap.

    Returns:
        The winner, the number of pairs, the interval on test pairs and the paths of the files.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        OSError: If nothing can be written in `out`.
        ValueError: If an argument is out of range, a file in `out` is no earlier result, the method is not a Matex, its
            prior is off although image maps are scored, or the objective needs boxes, a thorax or a mean image that are
            missing.
    """
    goal = find_objective(objective)
    own = _checked_method(method, goal)
    tried: dict[str, Sequence[Any] | None] = dict(
        zip(AXES, (grad_layers, flow, flow_layers, consistency_of, prior_shape, lambda_s, lambda_c, tau), strict=True)
    )
    for name, values in tried.items():
        if values is not None and not len(values):
            raise ValueError(f"{name} names no value to try. Give at least one value, or leave {name} out.")
        for value in values or []:
            # The constructor refuses invalid values.
            type(own)(**own.settings | {name: value})
    check_positive(batch_size=batch_size, raster=raster)
    if num_pairs < -1 or num_pairs == 0:
        raise ValueError(f"num_pairs must be positive, or -1 for all pairs, got {num_pairs}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    place = find_device(device)
    check_outputs(Path(out), OUTPUTS)
    clip = load_trained(ckpt_path).to(place)
    if goal.fill:
        check_fill(goal.fill, clip)
    prepare_data(data, clip.image_size, "val", "test")
    pairs = _choose(data, num_pairs, seed, goal)
    needs_thorax = goal.metric == "outside_thorax_mass"
    thorax = data.thorax() if needs_thorax else None

    batches = read_pairs(data, "val", pairs["val"], batch_size)
    if needs_thorax and thorax is None and all(batch["chest_box"].isnan().all() for batch in batches):
        raise ValueError(
            f"The objective {goal.name} needs the place of the thorax, but {type(data).__name__} has no `thorax()`, "
            "and no image has masks of both lungs. Use border_mass, or add `thorax()` or masks to the data module."
        )
    with borrowed(clip):
        depth = count_blocks(clip, *model_inputs(clip, batches[0]))
    grid = make_grid(own, goal, depth, tried, [pair.phrase for pair in pairs["val"]])
    attributed, seconds = attribute_pairs(clip, grid.deepest, batches, goal, thorax, seed)
    if goal.forwards:
        number, settings = len(pairs["val"]), len(grid.settings)
        log.info(
            f"The objective {goal.name} runs the model: {settings} settings of {number} pairs take "
            f"{settings * number * goal.forwards} forwards of the {goal.side} tower."
        )
    # At most one raster point per pixel.
    share = min(1, raster / max(clip.image_size))
    height, width = (max(1, round(side * share)) for side in clip.image_size)
    choice = choose_setting(attributed, grid, goal, (height, width))
    batches = read_pairs(data, "test", pairs["test"], batch_size)
    attributed, _ = attribute_pairs(clip, grid.deepest, batches, goal, thorax, seed)
    tests = [score_setting(attributed, tested, goal) for tested in (own, choice.winner.method)]
    result = provenance(clip, weight_hash(clip), ckpt_path, data, seed) | report(choice, tests, pairs, seconds, seed)
    return "\n".join([describe(result), "", *map(str, write_files(Path(out), result, choice))])


def _checked_method(method: AttributionMethod | str | None, goal: Objective) -> Matex:
    """MATEX to tune; for an image objective its prior must be on."""
    matex = load_method(method or Matex.recommended())
    if not isinstance(matex, Matex):
        raise ValueError(f"Only MATEX can be tuned, got {type(matex).__name__}. Leave method out, or give a Matex.")
    for name, off in (("delta", 0), ("lambda_s", 1)):
        if goal.side == "image" and getattr(matex, name) == off:
            raise ValueError(
                f"The method has {name}={off}, which switches the prior off and leaves no lambda_s to tune. "
                f"Give {name} another value."
            )
    return matex


def _choose(data: ChestXrayDataModule, number: int, seed: int, goal: Objective) -> dict[str, list[ImageTextPair]]:
    """Pairs of both splits."""
    kind = type(data).__name__
    pairs = {split: choose_pairs(data, split, number, seed, boxed=goal.needs_boxes) for split in ("val", "test")}
    for split, chosen in pairs.items():
        if goal.needs_boxes and not any(pair.boxes for pair in chosen):
            raise ValueError(
                f"The objective {goal.name} needs boxes, but no {split} pair of {kind} has any. Use one without boxes: "
                f"{', '.join(boxless_objectives())}."
            )
    return pairs
