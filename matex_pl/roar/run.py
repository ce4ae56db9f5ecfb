"""Commands of `matex roar`: run a plan locally or on a cluster, show its progress, and collect the scores."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from matex_pl.arguments import check_choices
from matex_pl.console import duration
from matex_pl.data import ChestXrayDataModule
from matex_pl.files import write_text
from matex_pl.report.benchmark import add_to_report
from matex_pl.report.results import RoarResult, parse
from matex_pl.report.roar import roar_tables, write_roar
from matex_pl.roar.cluster import RayOptions, check_gpus, work_on_ray
from matex_pl.roar.collect import collect
from matex_pl.roar.make import make_plan
from matex_pl.roar.plan import Plan, Protocol, Run, Training, read_plan, take_shard
from matex_pl.roar.work import broken_maps, failure, has_maps, prepare_maps, result, state, work_here, work_in_processes
from matex_pl.training.module import ClipModule, load_module

log = logging.getLogger(__name__)

_FAILURES_NAMED = 5


class RunsFailedError(RuntimeError):
    """Error of a command with failed runs; the results of the other runs are kept."""


def run_roar(
    protocol: Protocol,
    training: Training,
    ray: RayOptions,
    data: ChestXrayDataModule | None = None,
    ckpt_path: str | None = None,
    out: str | None = None,
    methods: list[str] | str = "matex,m2ib,grad_cam,chefer,saliency",
    init_model: str | None = None,
    init_weights: str | None = None,
    start: Literal["init", "explained"] = "init",
    plan: str | None = None,
    shard: str = "0/1",
    executor: Literal["local", "ray"] = "local",
    processes: int = 1,
) -> str:
    """Remove the parts that maps mark, retrain, and measure the loss: ROAR+ per method, modality and fraction.

    The command makes a plan in `OUT`: pairs, decoded once, weights and, once per method, maps. Then it works on the
    runs, each a fine-tuning from the same weights. The runs of a repeat share the split, the order of the batches and
    one clean run. Noise, smoothed noise and, if images have boxes, the true boxes are always among the methods. The
    same command continues a stopped plan. Started in a second terminal, it shares the work. After the last run it
    writes the tables.

    Args:
        protocol: Removal protocol and number of repeats.
        training: Fine-tuning of each run.
        ray: Options of the executor `ray`.
        data: Data module.
        ckpt_path: Checkpoint of `matex fit`, whose maps decide which parts are removed.
        out: Folder of the plan.
        methods: Names of shipped methods and YAML files, for example `matex,m2ib,mine.yaml`.
        init_model: Model from which each run starts, like `model.name` of a training; that of `ckpt_path` by default.
        init_weights: Weights from which each run starts, like `model.pretrained` of a training: a file, or a tag of
            open_clip for `init_model`.
        start: Start of each run: `init`, the weights of `init_model` and `init_weights`, or `explained`, those of
            `ckpt_path`. A checkpoint that was trained on these pairs has seen the validation pairs of every split, and
            the scores leak: use `explained` for other pairs only.
        plan: Folder of an existing plan, for example of the callback `RoarPlus`; replaces `data`, `ckpt_path` and
            `out`.
        shard: Runs of this command: `I/N` for every N-th run from the I-th on, for example `3/8` in the fourth of eight
            jobs.
        executor: `local`, or `ray` for a cluster.
        processes: Number of processes on this machine that share the runs, with the executor `local`.

    Returns:
        The table as text and the folder of the files, or the number of remaining runs.

    Raises:
        ValueError: If an argument is out of range, the folder holds another plan, or there are too few pairs.
        FileNotFoundError: If there is no such checkpoint or plan.
        RunsFailedError: If some runs failed; the others are kept, also after Ctrl-C.
    """
    check_choices(run_roar, locals())
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    if executor == "ray" and find_spec("ray") is None:
        raise ImportError("executor='ray' needs Ray. Install Ray with: pip install 'matex_pl[ray]'.")
    # Check the shard before the plan is made, which takes a while.
    take_shard([], shard)
    if plan is not None:
        opened = read_plan(Path(plan))
        given: dict[str, Any] = {"data": data, "ckpt_path": ckpt_path, "out": out}
        given["protocol"] = protocol if protocol not in (Protocol(), opened.protocol) else None
        given["training"] = training if training not in (Training(), opened.training) else None
        refused = [name for name, value in given.items() if value is not None]
        if refused:
            raise ValueError(
                f"The plan in {plan} has its own settings. Leave out {', '.join(refused)}, or leave out plan."
            )
    elif data is None or ckpt_path is None or out is None:
        raise ValueError("No plan given. Give data, ckpt_path and out, or plan, the folder of an existing plan.")
    else:
        if (start == "init") != bool(init_model or init_weights):
            raise ValueError(
                f"The start of the runs is unclear: start is {start!r}, init_model {init_model!r} and init_weights "
                f"{init_weights!r}. Give init_model and init_weights, the weights before the training of ckpt_path. If "
                "that training has not seen these pairs, give only --start explained."
            )
        explained = begin = load_module(ckpt_path)
        if start == "init":
            name = init_model or explained.hparams["name"]
            begin = ClipModule(name, init_weights, image_size=explained.clip.image_size)
        origins = {
            "checkpoint": ckpt_path,
            "start_checkpoint": " ".join(filter(None, [init_model, init_weights])) or ckpt_path,
        }
        names = methods.split(",") if isinstance(methods, str) else methods
        opened = make_plan(Path(out), data, explained, begin, names, protocol, training, origins)
    if executor == "ray":
        check_gpus(opened.training, ray)
    try:
        if not has_maps(opened):
            log.info("Computing the missing maps.")
            prepare_maps(opened)
            for name, reason in opened.refusals().items():
                log.warning("%s does not support the model and is left out: %s", name, reason)
            for name, trace in broken_maps(opened).items():
                log.warning("The maps of %s failed, so its runs fail too: %s", name, trace.strip().splitlines()[-1])
        runs = take_shard(opened.runs(), shard)
        left = [run for run in runs if result(opened, run) is None]
        log.info("%d of %d runs to do, each of %d steps.", len(left), len(runs), opened.steps())
        if executor == "ray" and left:
            work_on_ray(opened, left, ray)
        elif processes > 1 and left:
            work_in_processes(opened, left, shard, processes)
        else:
            work_here(opened, left)
    except (KeyboardInterrupt, SystemExit):
        done = [result(opened, run) is not None for run in opened.runs()]
        log.info("Stopped; %d of %d runs are done. The same command continues.", sum(done), len(done))
        raise
    return _summary(opened, runs)


def _summary(plan: Plan, runs: Sequence[Run]) -> str:
    """Table if all runs of the plan are done, else the number of remaining runs."""
    failed = {run.id: error for run in runs if (error := failure(plan, run))}
    if failed:
        write_results(plan)
        lines = [f"  {name}: {error}\n    {plan.folder}/runs/{name}/error.log" for name, error in failed.items()]
        if len(lines) > _FAILURES_NAMED:
            lines[_FAILURES_NAMED:] = [f"  and {len(lines) - _FAILURES_NAMED} more; see `matex roar status`"]
        raise RunsFailedError(
            "\n".join([f"{len(failed)} of {len(runs)} runs failed:", *lines])
            + f"\nThe other runs are kept and shown in {plan.folder}/report.html. Run the same command again to retry "
            "the failed runs."
        )
    left = sum(result(plan, run) is None for run in plan.runs())
    if left:
        return f"These runs are done; {left} runs of the plan are left. See `matex roar status {plan.folder}`."
    return collect_roar(str(plan.folder))


def roar_status(folder: str) -> str:
    """Progress of the plan in `folder`: done, running, failed and remaining runs, and the estimated time."""
    plan = read_plan(Path(folder))
    runs = plan.runs()
    states: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        states[state(plan, run)].append(run)
    done, running, failed = (len(states[name]) for name in ("done", "running", "failed"))
    lines = [f"{done} of {len(runs)} runs are done, {running} running, {failed} failed."]
    if not has_maps(plan):
        lines.append("Some maps are still missing.")
    lines += [f"  running: {run.id}" for run in states["running"]]
    lines += [f"  stopped: {run.id}: the process ended; `matex roar run` restarts the run" for run in states["died"]]
    lines += [f"  failed: {run.id}: {failure(plan, run)} (runs/{run.id}/error.log)" for run in states["failed"]]
    seconds = [scores["seconds"] for run in states["done"] if (scores := result(plan, run))]
    left = len(runs) - done
    if not left:
        lines.append(f"`matex roar collect {folder}` writes the tables.")
    elif not seconds:
        lines.append(f"The time of the {left} remaining runs can be estimated after the first run.")
    else:
        at_once = f"with {running} at a time" if running else "one at a time; no run is active now"
        rest = duration(mean(seconds) * left / max(running, 1))
        lines.append(f"About {rest} for the {left} remaining runs, {at_once}.")
    return "\n".join(lines)


def collect_roar(folder: str, report: str | None = None) -> str:
    """Write the scores of a plan's runs: `results.json`, `table.md`, curves as PNG and SVG, and `report.html`.

    Args:
        folder: Folder of the plan. Unfinished runs are named and left empty in the tables.
        report: Folder of a `matex benchmark`, whose tables and page get the scores too.

    Returns:
        The table as text, and the folder of the files.
    """
    results = write_results(read_plan(Path(folder)))
    if report is not None:
        add_to_report(results, Path(report))
    return f"{roar_tables(results, is_short=True)}\nAll results: {folder}/report.html, table.md and results.json."


def write_results(plan: Plan) -> RoarResult:
    """Write the scores of a plan's runs into its folder, and return them."""
    content = collect(plan)
    write_text(plan.folder / "results.json", json.dumps(content, indent=1, allow_nan=False))
    result = parse(RoarResult, content)
    write_roar(result, plan.folder)
    return result
