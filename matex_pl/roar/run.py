"""What `matex roar` runs: a plan's cells here or on a cluster, how far it is, and what came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from matex_pl.arguments import check_choice
from matex_pl.data import ChestXrayDataModule
from matex_pl.files import write_text
from matex_pl.report.benchmark import add_to_report
from matex_pl.report.results import RoarResult, parse
from matex_pl.report.roar import roar_tables, write_roar
from matex_pl.roar.cluster import RayOptions, check_gpus, check_ray, work_on_ray
from matex_pl.roar.collect import collect
from matex_pl.roar.lease import is_leased, sweep
from matex_pl.roar.make import make_plan
from matex_pl.roar.plan import Cell, Plan, Protocol, Training, duration, read_plan, some_cells
from matex_pl.roar.processes import work_in_processes
from matex_pl.roar.work import broken_maps, failure, has_maps, prepare_maps, result, work_here
from matex_pl.training.module import ClipModule, load_module

EXECUTORS = ("local", "ray")
_FAILURES_NAMED = 5


class CellsFailedError(RuntimeError):
    """Some cells of a plan ended with an error; the others are kept."""


def run_roar(
    protocol: Protocol,
    training: Training,
    ray: RayOptions,
    data: ChestXrayDataModule | None = None,
    ckpt_path: str | None = None,
    out: str | None = None,
    methods: list[str] | str = "matex,m2ib,grad_cam,chefer,saliency",
    start_name: str | None = None,
    start_pretrained: str | None = None,
    plan: str | None = None,
    cells: str | None = None,
    executor: str = "local",
    processes: int = 1,
) -> str:
    """Remove what maps mark, train again, and see what the model lost: ROAR+ for each method, modality and fraction.

    A plan is made in `OUT`: pairs, decoded once, weights and, once per method, maps. Then its cells are run, each a
    fine-tuning from the same weights; a repeat's cells share split, order of the batches and one clean run. Noise,
    noise as smooth as maps are and, where films have boxes, these are always among the methods. The same command again
    goes on where it was stopped; in a second terminal it takes part; when all cells are done the tables are written.

    Args:
        protocol: What is removed, and how often.
        training: The fine-tuning of each cell.
        ray: Of the executor `ray`.
        data: The data module.
        ckpt_path: A checkpoint of `matex fit`, whose maps say what is removed.
        out: Folder of the plan.
        methods: Names of shipped methods and YAML files, `matex,m2ib,mine.yaml`.
        start_name: Model that each cell starts from, as `model.name` of a training; that of `ckpt_path` by default.
        start_pretrained: Weights that each cell starts from, as `model.pretrained` of a training: a file, or a tag of
            open_clip beside `start_name`. Those of `ckpt_path` when neither is given.
        plan: Folder of a plan that is there already, as the callback `RoarPlus` writes it, in place of `data`,
            `ckpt_path` and `out`.
        cells: Every n-th cell from the i-th only, as `3::8` in the fourth of eight jobs.
        executor: `local`, or `ray` for a cluster.
        processes: Processes of this machine that take cells, with the executor `local`.

    Returns:
        The table as text, and where the files are; or how many cells are left.

    Raises:
        ValueError: An argument is out of range, the folder holds another plan, or there are too few pairs.
        FileNotFoundError: There is no such checkpoint or plan.
        ImportError: Ray is not installed.
        CellsFailedError: Some cells failed.
        KeyboardInterrupt: Somebody pressed Ctrl-C; what is done is kept.
        SystemExit: The process was told to end, by SIGTERM.
    """
    check_choice("executor", executor, EXECUTORS)
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    if executor == "ray":
        check_ray()
    if cells is not None:
        # Before the plan is made: it takes a while.
        some_cells([], cells)
    opened = _open(protocol, training, data, ckpt_path, out, methods, start_name, start_pretrained, plan)
    if executor == "ray":
        check_gpus(opened.training, ray)
    log = Console(stderr=True, highlight=False)
    try:
        _make_maps(opened, log)
        mine = opened.cells() if cells is None else some_cells(opened.cells(), cells)
        left = [cell for cell in mine if result(opened, cell) is None]
        log.print(f"{len(left)} of {len(mine)} cells to run, each of {opened.steps()} steps.", soft_wrap=True)
        if executor == "ray" and left:
            work_on_ray(opened, left, ray)
        elif processes > 1 and left:
            work_in_processes(opened, left, processes)
        else:
            work_here(opened, left)
    except (KeyboardInterrupt, SystemExit):
        done = [result(opened, cell) is not None for cell in opened.cells()]
        log.print(f"Stopped; {sum(done)} of {len(done)} cells are done, the same command goes on.", soft_wrap=True)
        raise
    finally:
        sweep(opened.folder, [opened.path(cell) for cell in opened.cells()])
    return _ended(opened, mine)


def _open(
    protocol: Protocol,
    training: Training,
    data: ChestXrayDataModule | None,
    ckpt_path: str | None,
    out: str | None,
    methods: list[str] | str,
    start_name: str | None,
    start_pretrained: str | None,
    plan: str | None,
) -> Plan:
    """The plan that is there, or the one that the arguments describe."""
    if plan is not None:
        return _there(Path(plan), protocol, training, {"data": data, "ckpt_path": ckpt_path, "out": out})
    if data is None or ckpt_path is None or out is None:
        raise ValueError("there is no plan. Give data, ckpt_path and out, or plan, the folder of one.")
    explained = load_module(ckpt_path)
    start, origin = explained, ckpt_path
    if start_name or start_pretrained:
        start = ClipModule(
            start_name or explained.hparams["name"], start_pretrained, image_size=explained.clip.image_size
        )
        origin = " ".join(part for part in (start_name, start_pretrained) if part)
    about = {"checkpoint": ckpt_path, "start_checkpoint": origin}
    names = methods.split(",") if isinstance(methods, str) else methods
    return make_plan(Path(out), data, explained, start, names, protocol, training, about)


def _there(folder: Path, protocol: Protocol, training: Training, others: dict[str, Any]) -> Plan:
    """The plan of a folder, whose settings are its own: others beside it are an error, not passed over."""
    found = read_plan(folder)
    given = [name for name, value in others.items() if value is not None]
    given += ["protocol"] if protocol not in (Protocol(), found.protocol) else []
    given += ["training"] if training not in (Training(), found.training) else []
    if given:
        raise ValueError(f"the plan in {folder} has its own settings. Leave out {', '.join(given)}, or leave out plan.")
    return found


def _make_maps(plan: Plan, log: Console) -> None:
    if has_maps(plan):
        return
    log.print("Making maps, where they are not there yet.", soft_wrap=True)
    prepare_maps(plan)
    for name, why in plan.refusals().items():
        log.print(f"{name} refuses the model and is left out: {why}", soft_wrap=True, markup=False)
    for name, why in broken_maps(plan).items():
        last = why.strip().splitlines()[-1]
        log.print(f"The maps of {name} failed, and so do its cells: {last}", soft_wrap=True, markup=False)


def _ended(plan: Plan, cells: Sequence[Cell]) -> str:
    """The table, if all of the plan is done; else what is left of it."""
    failed = {cell.id: error for cell in cells if (error := failure(plan, cell))}
    if failed:
        write_results(plan)
        raise CellsFailedError(
            f"{len(failed)} of {len(cells)} cells failed:\n{_named(plan, failed)}\n"
            f"The others are kept, and {plan.folder}/report.html shows them. The same command tries these again."
        )
    left = sum(result(plan, cell) is None for cell in plan.cells())
    if left:
        return f"These cells are done; {left} others of the plan are left. See `matex roar status {plan.folder}`."
    return collect_roar(str(plan.folder))


def _named(plan: Plan, failed: dict[str, str]) -> str:
    """A line for each of the first failures, with its log."""
    lines = [f"  {name}: {error}\n    {plan.folder}/cells/{name}/error.log" for name, error in failed.items()]
    more = len(lines) - _FAILURES_NAMED
    return "\n".join(lines[:_FAILURES_NAMED] + ([f"  and {more} more, see `matex roar status`"] if more > 0 else []))


def roar_status(folder: str) -> str:
    """Say how far a plan is: cells that are done, running, failed and left, and about how long the rest takes.

    Args:
        folder: Of the plan.

    Raises:
        FileNotFoundError: There is no plan.
    """
    plan = read_plan(Path(folder))
    cells = plan.cells()
    done = [found for cell in cells if (found := result(plan, cell)) is not None]
    running = [cell.id for cell in cells if result(plan, cell) is None and is_leased(plan.path(cell))]
    failed = {cell.id: error for cell in cells if cell.id not in running and (error := failure(plan, cell))}
    lines = [f"{len(done)} of {len(cells)} cells are done, {len(running)} running, {len(failed)} failed."]
    if not has_maps(plan):
        lines.append("The maps are not all made yet.")
    lines += [f"  running: {name}" for name in running]
    lines += [f"  failed: {name}: {error} (cells/{name}/error.log)" for name, error in failed.items()]
    return "\n".join([*lines, _outlook(plan, done, len(cells) - len(done), len(running))])


def _outlook(plan: Plan, done: Sequence[dict[str, Any]], left: int, running: int) -> str:
    """What is still to come: the time, if there is something to tell it by."""
    if not left:
        return f"`matex roar collect {plan.folder}` writes the tables."
    at_once = f"with {running} at a time" if running else "one at a time; no cell is running now"
    if not done:
        return f"How long the {left} left take is known after the first."
    seconds = mean(found["seconds"] for found in done) * left / max(running, 1)
    return f"About {duration(seconds)} for the {left} left, {at_once}."


def collect_roar(folder: str, report: str | None = None) -> str:
    """Write what a plan's cells say: `results.json`, `table.md`, curves as PNG and SVG, and `report.html`.

    Args:
        folder: Of the plan; what is not done yet is left open in the tables, and named.
        report: Folder of a `matex benchmark`, whose tables and page get the scores too.

    Returns:
        The table as text, and where the files are.

    Raises:
        FileNotFoundError: There is no plan, or no benchmark.
    """
    found = write_results(read_plan(Path(folder)))
    if report is not None:
        add_to_report(found, Path(report))
    return f"{roar_tables(found, is_short=True)}\n{folder}/report.html, table.md and results.json hold all of it."


def write_results(plan: Plan) -> RoarResult:
    """Write what the cells say into the plan's folder, and give it."""
    content = collect(plan)
    write_text(plan.folder / "results.json", json.dumps(content, indent=1, allow_nan=False))
    result = parse(RoarResult, content)
    write_roar(result, plan.folder)
    return result
