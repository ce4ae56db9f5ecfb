"""Runs of `matex roar` that are killed, shared, stopped, or fail in parts: what is finished stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from matex_pl.attribution import Chefer
from matex_pl.cli import main
from matex_pl.data import PhantomDataModule
from matex_pl.roar import Protocol, RayOptions, Training, run_roar
from matex_pl.roar import work as roar_work
from matex_pl.roar.cluster import init_settings
from matex_pl.roar.finetune import RoarModule
from matex_pl.roar.plan import read_plan

IMAGES = {"num_train": 14, "num_val": 2, "num_test": 2, "stored_size": 64, "batch_size": 4, "num_workers": 0}
ROWS = ("chefer", "randommap", "randommap-blurred", "centermap", "true-boxes")
RUNS = ["repeat-0/clean", *(f"repeat-0/image/{row}/0.5" for row in ROWS)]
WAIT = 300


class Broken(Chefer):
    """A method that makes no maps."""

    def attribute(self, *args, **kwargs):
        raise RuntimeError("no map today")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A YAML of `matex roar run`: six runs of four steps."""
    from lightning.pytorch import Trainer

    from matex_pl import ClipModule

    folder = tmp_path_factory.mktemp("roar")
    data = {"class_path": "matex_pl.data.PhantomDataModule", "init_args": {"root": str(folder / "images"), **IMAGES}}
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, **quiet)
    module = ClipModule(str(Path(__file__).with_name("tiny.json")), lr=1e-3, warmup_steps=0)
    trainer.fit(module, PhantomDataModule(**data["init_args"]))
    trainer.save_checkpoint(folder / "last.ckpt")
    settings = {
        "data": data,
        "ckpt_path": str(folder / "last.ckpt"),
        "methods": ["chefer"],
        "start": "explained",
        "protocol": {"modalities": ["image"], "fractions": [0.5], "repeats": 1},
        "training": {"accelerator": "cpu", "epochs": 1, "batch_size": 4, "lr": 0.001, "warmup_steps": 1},
    }
    path = folder / "roar.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a plan that ran to its end in one go."""
    folder = tmp_path_factory.mktemp("whole") / "plan"
    main(command(config, folder))
    return folder


@pytest.fixture
def made(whole, tmp_path):
    """A plan with its maps, without any run done."""
    return Path(shutil.copytree(whole, tmp_path / "made", ignore=shutil.ignore_patterns("runs", "*.html", "*.md")))


@pytest.fixture(scope="module")
def elsewhere():
    """Processes that have imported this package and done nothing with it, so that they may fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "matex_pl.cli", "matex_pl.roar"])
    return context


def command(config, out, *more):
    return ["roar", "run", "--config", str(config), "--out", str(out), *more]


def numbers(folder):
    """Scores of the runs, without their times."""
    found = {}
    for path in sorted((folder / "runs").rglob("result.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        found[scores["run"]] = {name: value for name, value in scores.items() if "seconds" not in name}
    return found


def identities(folder):
    """Which files the results are, and when they were written."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("result.json")}


def rests(folder):
    """Marks of processes and files half written."""
    return [path.name for path in folder.rglob("*") if path.name == "pid" or path.name.endswith(".part")]


def wait_for(what):
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def refused(capsys, words):
    """What a command says that ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_the_whole_plan(whole):
    assert set(numbers(whole)) == set(RUNS)
    assert len({scores["loss"] for scores in numbers(whole).values()}) == len(RUNS)
    assert not rests(whole)
    assert (whole / "report.html").is_file()


# 1. Killed.


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_maps(words):
    """Within the second file of maps, which is written and has no name yet."""
    from matex_pl.evaluation import tensors

    save, seen = tensors.save_file, []

    def save_and_die(tensors, path, head):
        save(tensors, path, head)
        if path.parent.parent.name == "maps":
            seen.append(path)
            if len(seen) == 2:
                die()

    tensors.save_file = save_and_die
    main(words)


def killed_in_run(words):
    """At the second step of the third run."""
    step, seen = RoarModule.training_step, []

    def step_and_die(self, *args):
        seen.append(self)
        if sum(module is self for module in seen) == 2 and len(set(map(id, seen))) == 3:
            die()
        return step(self, *args)

    RoarModule.training_step = step_and_die
    main(words)


def killed_before_rename(words):
    """When the second result is written and has no name yet."""
    rename, seen = Path.replace, []

    def die_or_rename(self, target):
        if Path(target).name == "result.json":
            seen.append(target)
            if len(seen) == 2:
                die()
        return rename(self, target)

    Path.replace = die_or_rename
    main(words)


def killed_before_release(words):
    """When the first result is there, and its lock is held."""
    rename = Path.replace

    def rename_and_die(self, target):
        rename(self, target)
        if Path(target).name == "result.json":
            die()

    Path.replace = rename_and_die
    main(words)


@pytest.mark.parametrize(
    ("body", "finished", "left_over"),
    [
        (killed_in_maps, 0, ["part"]),
        (killed_in_run, 2, ["pid"]),
        (killed_before_rename, 1, ["part", "pid"]),
        (killed_before_release, 1, ["pid"]),
    ],
)
def test_killed_it_goes_on_with_what_is_finished(config, whole, tmp_path, elsewhere, body, finished, left_over):
    out = tmp_path / "plan"
    process = elsewhere.Process(target=body, args=(command(config, out),))
    process.start()
    process.join(WAIT)
    assert process.exitcode == -signal.SIGKILL
    before = identities(out)
    assert len(before) == finished
    assert sorted("part" if name.endswith(".part") else name for name in rests(out)) == left_over
    main(command(config, out))
    assert {name: identities(out)[name] for name in before} == before
    assert numbers(out) == numbers(whole)
    assert not rests(out)


# 2. Shared.


def run_and_log(words, log, failing):
    """Run with a line in `log` for each attempt; before its first end, the other process must have begun as well."""
    train = roar_work.train_run

    def logged(plan, images, run, *rest):
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {run.id}\n")
        wait_for(lambda: len({line.split()[0] for line in log.read_text(encoding="utf-8").splitlines()}) == 2)
        if run.id == failing:
            raise RuntimeError("boom")
        return train(plan, images, run, *rest)

    roar_work.train_run = logged
    main(words)


def attempts(log):
    """The processes and the runs of each attempt."""
    return tuple(zip(*(line.split() for line in log.read_text(encoding="utf-8").splitlines()), strict=True))


@pytest.mark.parametrize("failing", [None, RUNS[2]], ids=["all well", "one fails"])
def test_two_processes_do_each_run_once(config, whole, tmp_path, elsewhere, failing):
    out, log = tmp_path / "plan", tmp_path / "log"
    log.touch()
    both = [elsewhere.Process(target=run_and_log, args=(command(config, out), log, failing)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(WAIT)
    assert [process.exitcode for process in both] == [2 if failing else 0] * 2
    pids, runs = attempts(log)
    assert sorted(runs) == sorted(RUNS)
    assert set(pids) == {str(process.pid) for process in both}
    assert numbers(out) == {name: scores for name, scores in numbers(whole).items() if name != failing}
    assert not rests(out)


def stop_in_first_run(words):
    """Stop this process within its first run, until somebody wakes it."""
    train = roar_work.train_run

    def stopped(plan, images, run, *rest):
        os.kill(os.getpid(), signal.SIGSTOP)
        roar_work.train_run = train
        return train(plan, images, run, *rest)

    roar_work.train_run = stopped
    main(words)


def test_a_process_that_slept_keeps_its_run_and_the_others_are_done_without_it(made, whole, elsewhere, capsys):
    words = ["roar", "run", "--plan", str(made)]
    sleeper, other = (elsewhere.Process(target=body, args=(words,)) for body in (stop_in_first_run, main))
    sleeper.start()
    wait_for(lambda: list(made.rglob("pid")))
    other.start()
    wait_for(lambda: len(identities(made)) == len(RUNS) - 1)
    before = identities(made)
    main(["roar", "status", str(made)])
    said = capsys.readouterr().out
    assert f"5 of 6 runs are done, 1 running, 0 failed.\n  running: {RUNS[0]}\n" in said
    assert other.is_alive()
    os.kill(sleeper.pid, signal.SIGCONT)
    for process in (sleeper, other):
        process.join(WAIT)
        assert process.exitcode == 0
    assert {name: identities(made)[name] for name in before} == before
    assert numbers(made) == numbers(whole)
    assert not list(made.rglob("error.log"))
    assert not rests(made)


def test_a_run_whose_process_was_killed_is_taken_over(made, whole, elsewhere):
    words = ["roar", "run", "--plan", str(made)]
    sleeper, other = (elsewhere.Process(target=body, args=(words,)) for body in (stop_in_first_run, main))
    sleeper.start()
    wait_for(lambda: list(made.rglob("pid")))
    other.start()
    wait_for(lambda: identities(made))
    sleeper.kill()
    sleeper.join(WAIT)
    other.join(WAIT)
    assert other.exitcode == 0
    assert numbers(made) == numbers(whole)
    assert not rests(made)


# 3. Processes that are started: what they do is told to them by the environment.

HOOK = '''"""In processes that work on runs: a line per attempt, and an end or a wait where the environment says so."""
import os, sys, time
if any("matex_pl.roar" in word or "default_worker" in word for word in sys.orig_argv):
    from matex_pl.roar import work
    train = work.train_run
    def train_run(plan, images, run, *rest):
        with open(os.environ["ROAR_LOG"], "a") as file:
            file.write(f"{os.getpid()} {run.id}\\n")
        if run.id == os.environ.get("ROAR_DIE"):
            os._exit(7)
        if "ROAR_WAIT" in os.environ:
            time.sleep(1000)
        return train(plan, images, run, *rest)
    work.train_run = train_run
'''


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Has processes started from now on write their attempts to this file."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    package = Path(roar_work.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), str(package)]))
    monkeypatch.setenv("ROAR_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tries"),
    [(["--processes", "2"], 1), (["--executor", "ray", "--ray.num_cpus", "1", "--ray.retries", "1"], 2)],
    ids=["processes", "ray"],
)
def test_other_executors_give_the_same_and_survive_what_dies(
    made, whole, log, capsys, monkeypatch, tmp_path, options, tries
):
    if "ray" in options:
        pytest.importorskip("ray")
        monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("ROAR_DIE", RUNS[1])
    said = refused(capsys, ["roar", "run", "--plan", made, *options])
    assert f"1 of 6 runs failed:\n  {RUNS[1]}: " in said
    assert f"{made}/runs/{RUNS[1]}/error.log" in said
    assert numbers(made) == {name: scores for name, scores in numbers(whole).items() if name != RUNS[1]}
    assert not rests(made)
    assert signal.getsignal(signal.SIGTERM) is handler
    pids, runs = attempts(log)
    assert sorted(runs) == sorted([*RUNS, *[RUNS[1]] * (tries - 1)])
    assert len(set(pids)) > 1
    if "ray" in options:
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    main(["roar", "run", "--plan", str(made)])
    assert numbers(made) == numbers(whole)


def run_with(environment, words, said):
    """Run in an environment, with what is printed for people in a file."""
    os.environ.update(environment)
    # Ignored where the tests run in the background of a shell script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with said.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
    main(words)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_processes_end_with_the_one_that_started_them(made, log, tmp_path, elsewhere, monkeypatch, sent):
    monkeypatch.setenv("ROAR_WAIT", "1")
    words, said = ["roar", "run", "--plan", str(made), "--processes", "2"], tmp_path / "said"
    # The environment of what is started now is this one's, that of `elsewhere` was fixed when it began.
    parent = elsewhere.Process(target=run_with, args=(dict(os.environ), words, said))
    parent.start()
    wait_for(lambda: log.exists() and len(attempts(log)[0]) == 2)
    os.kill(parent.pid, sent)
    parent.join(WAIT)
    if sent == signal.SIGINT:
        assert parent.exitcode == 130
        assert "Stopped; 0 of 6 runs are done" in said.read_text(encoding="utf-8")
        assert not rests(made)
    assert "Traceback" not in said.read_text(encoding="utf-8")
    for pid in attempts(log)[0]:
        wait_for(lambda pid=pid: not is_running(int(pid)))


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_address_of_a_cluster(made, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    given = {}

    def init(**settings):
        given.update(settings)
        raise ConnectionError("no cluster there")

    monkeypatch.setattr(ray, "init", init)
    said = refused(capsys, ["roar", "run", "--plan", made, "--executor", "ray", "--ray.address", "ray://head:10001"])
    assert "matex roar: No Ray cluster answers at 'ray://head:10001'" in said
    assert given == init_settings("ray://head:10001")
    assert "include_dashboard" not in given
    assert init_settings(None)["include_dashboard"] is False


def test_runs_on_gpus_that_ray_does_not_give(made, capsys):
    path = made / "plan.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"accelerator": "cpu"', '"accelerator": "gpu"'))
    said = refused(capsys, ["roar", "run", "--plan", made, "--executor", "ray"])
    assert "training.accelerator is 'gpu', but ray.num_gpus is 0." in said


def test_without_ray(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused(capsys, ["roar", "run", "--plan", made, "--executor", "ray"])
    assert "pip install 'matex_pl[ray]'" in said


# 4. Failing.


def fail_in(monkeypatch, name, error):
    train = roar_work.train_run

    def fail(plan, images, run, *rest):
        if run.id == name:
            raise error
        return train(plan, images, run, *rest)

    monkeypatch.setattr(roar_work, "train_run", fail)


def test_a_run_that_fails_is_named_and_tried_again(made, whole, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        fail_in(patch, RUNS[1], RuntimeError("boom"))
        said = refused(capsys, ["roar", "run", "--plan", made])
    log = made / "runs" / RUNS[1] / "error.log"
    assert f"matex roar: 1 of 6 runs failed:\n  {RUNS[1]}: RuntimeError: boom\n    {log}\n" in said
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert set(numbers(made)) == set(RUNS) - {RUNS[1]}
    main(["roar", "status", str(made)])
    said = capsys.readouterr().out
    assert "5 of 6 runs are done, 0 running, 1 failed." in said
    assert f"failed: {RUNS[1]}: RuntimeError: boom" in said
    found = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert [failed["run"] for failed in found["failed"]] == [RUNS[1]]
    point = next(row for row in found["rows"] if row["name"] == "Chefer")["points"][0]
    assert (point["value"], point["repeats"]) == (None, [None])
    assert point["missing"] == [f"{RUNS[1]} (failed)"]
    before = identities(made)
    main(["roar", "run", "--plan", str(made)])
    assert {name: identities(made)[name] for name in before} == before
    assert numbers(made) == numbers(whole)
    found = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert found["failed"] == []
    capsys.readouterr()
    main(["roar", "status", str(made)])
    assert "6 of 6 runs are done, 0 running, 0 failed." in capsys.readouterr().out


def test_a_clean_run_that_fails_leaves_its_repeat_open(made, capsys, monkeypatch):
    fail_in(monkeypatch, RUNS[0], ValueError("no clean run"))
    assert f"{RUNS[0]}: ValueError: no clean run" in refused(capsys, ["roar", "run", "--plan", made])
    found = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert found["clean"][0]["loss"] is None
    assert all(point["value"] is None for row in found["rows"] for point in row["points"])


def test_a_method_that_makes_no_maps_takes_no_other_with_it(config, whole, tmp_path, capsys, monkeypatch):
    own, out = tmp_path / "own.yaml", tmp_path / "plan"
    own.write_text(f"class_path: {__name__}.Broken\n", encoding="utf-8")
    words = command(config, out, f"--methods=[{own},chefer]")
    said = refused(capsys, words)
    assert "The maps of own failed, so its runs fail too: RuntimeError: no map today" in said
    assert "1 of 7 runs failed:\n  repeat-0/image/own/0.5: RuntimeError: no map today" in said
    log = (out / "runs/repeat-0/image/own/0.5/error.log").read_text(encoding="utf-8")
    assert "in make_maps" in log
    assert numbers(out) == numbers(whole)
    monkeypatch.setattr(Broken, "attribute", Chefer.attribute)
    main(words)
    assert set(numbers(out)) == {*RUNS, "repeat-0/image/own/0.5"}


# 5. Parts of a plan, and errors of use.


def test_two_halves_are_the_whole(made, whole, capsys):
    main(["roar", "run", "--plan", str(made), "--shard", "0/2"])
    assert "These runs are done; 3 runs of the plan are left." in capsys.readouterr().out
    assert set(numbers(made)) == set(RUNS[0::2])
    main(["roar", "status", str(made)])
    said = capsys.readouterr().out
    assert "3 of 6 runs are done" in said
    assert "for the 3 remaining runs, one at a time; no run is active now." in said
    main(["roar", "run", "--plan", str(made), "--shard", "1/2"])
    assert numbers(made) == numbers(whole)
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["8/8", "1:2", "/2", "0/0", "-1/2", "three"])
def test_other_forms_of_shards_are_refused_before_any_work(config, tmp_path, capsys, shard):
    said = refused(capsys, command(config, tmp_path / "plan", f"--shard={shard}"))
    assert "shard must be I/N with I below N" in said
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--training.lr=0.5"], "training.lr is 0.001 in the plan, 0.5 in this command"),
        (["--protocol.seed=7"], "protocol.seed is 0 in the plan, 7 in this command"),
        (["--methods=[m2ib]"], "methods is"),
        (["--data.init_args.num_train=16"], "about.data."),
    ],
)
def test_other_settings_in_the_folder_are_named(config, whole, capsys, options, message):
    said = refused(capsys, command(config, whole, *options))
    assert "holds a plan with other settings" in said
    assert message in said


def test_errors_of_use(config, whole, tmp_path, capsys):
    nothing = tmp_path / "nothing"
    assert "holds no plan" in refused(capsys, ["roar", "run", "--plan", nothing])
    assert "holds no plan" in refused(capsys, ["roar", "status", nothing])
    assert "holds no plan" in refused(capsys, ["roar", "collect", nothing])
    assert "Give data, ckpt_path and out, or plan" in refused(capsys, ["roar", "run"])
    # Weights that may have seen the validation pairs are taken on request only.
    assert "give only --start explained" in refused(capsys, command(config, nothing, "--start", "init"))
    both = command(config, nothing, "--init_model", "tiny.json")
    assert "give only --start explained" in refused(capsys, both)
    assert "No checkpoint at" in refused(capsys, command(config, nothing, "--ckpt_path", tmp_path / "none.ckpt"))
    assert "There is no method 'nope'" in refused(capsys, command(config, nothing, "--methods=[nope]"))
    assert "processes must be at least 1" in refused(capsys, command(config, nothing, "--processes=0"))
    assert "--executor must be one of 'local', 'ray', got 'slurm'" in refused(
        capsys, command(config, nothing, "--executor=slurm")
    )
    assert "ray.retries must not be negative" in refused(capsys, command(config, nothing, "--ray.retries=-1"))
    said = refused(capsys, ["roar", "run", "--plan", whole, "--training.epochs=3", "--out", nothing])
    assert "has its own settings. Leave out out, training" in said
    assert not nothing.exists()


# 6. What it says.


def test_what_a_run_says_without_a_terminal(made, capsys):
    main(["roar", "run", "--plan", str(made)])
    said = capsys.readouterr().err
    assert "6 of 6 runs to do, each of 4 steps." in said
    assert "1 of 6 runs have ended, about " in said
    assert "Computing the missing maps" not in said
    main(["roar", "run", "--plan", str(made)])
    assert "0 of 6 runs to do" in capsys.readouterr().err


def test_a_long_run_says_that_it_goes_on(made, capsys, monkeypatch):
    monkeypatch.setattr(roar_work, "_LINE_SECONDS", 0.0)
    main(["roar", "run", "--plan", str(made)])
    said = capsys.readouterr().err
    assert "0 of 6 runs have ended.\n" in said
    # Four steps of a run, and its end.
    assert said.count("1 of 6 runs have ended, about ") > 2


def test_status_in_the_middle(made, whole, capsys):
    main(["roar", "status", str(made)])
    assert "0 of 6 runs are done, 0 running" in capsys.readouterr().out
    for name in RUNS[:2]:
        shutil.copytree(whole / "runs" / name, made / "runs" / name)
        path = made / "runs" / name / "result.json"
        found = json.loads(path.read_text(encoding="utf-8")) | {"seconds": 60}
        path.write_text(json.dumps(found), encoding="utf-8")
    with ExitStack() as held:
        for run in read_plan(made).runs()[2:4]:
            held.enter_context(roar_work.locked(read_plan(made), run))
        main(["roar", "status", str(made)])
    said = capsys.readouterr().out
    assert "2 of 6 runs are done, 2 running, 0 failed." in said
    assert f"  running: {RUNS[2]}\n  running: {RUNS[3]}\n" in said
    assert "About 2 min for the 4 remaining runs, with 2 at a time." in said


def test_status_after_a_process_was_killed(made, elsewhere, capsys):
    process = elsewhere.Process(target=killed_in_run, args=(["roar", "run", "--plan", str(made)],))
    process.start()
    process.join(WAIT)
    main(["roar", "status", str(made)])
    said = capsys.readouterr().out
    assert f"2 of 6 runs are done, 0 running, 0 failed.\n  stopped: {RUNS[2]}: the process ended" in said


def test_status_before_the_maps_and_at_the_end(made, whole, capsys):
    (made / "refused.json").unlink()
    main(["roar", "status", str(made)])
    assert "Some maps are still missing." in capsys.readouterr().out
    main(["roar", "status", str(whole)])
    assert f"`matex roar collect {whole}` writes the tables." in capsys.readouterr().out


def test_a_damaged_result_is_named(made, capsys):
    path = made / "runs" / RUNS[0] / "result.json"
    path.parent.mkdir(parents=True)
    path.touch()
    for words in (["run", "--plan"], ["status"], ["collect"]):
        assert f"{path} is damaged" in refused(capsys, ["roar", *words, made])


@pytest.mark.parametrize("verb", ["run", "status", "collect"])
def test_help(capsys, verb):
    with pytest.raises(SystemExit) as end:
        main(["roar", verb, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    wanted = {
        "run": [
            "Remove the pixels and words that maps mark",
            "--shard",
            "3/8",
            "--executor",
            "--processes",
            "--ray.num_gpus",
        ],
        "status": ["Show the progress of a plan", "folder"],
        "collect": ["Write the tables, curves and page of a plan", "folder", "--report"],
    }
    for word in wanted[verb]:
        assert word in said


# 7. From Python, and Ctrl-C.


def test_from_python(config, whole, tmp_path):
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    said = run_roar(
        Protocol(**settings["protocol"]),
        Training(**settings["training"]),
        RayOptions(),
        data=PhantomDataModule(**settings["data"]["init_args"]),
        ckpt_path=settings["ckpt_path"],
        out=str(tmp_path / "plan"),
        methods="chefer",
        start="explained",
    )
    assert "Chefer" in said
    assert numbers(tmp_path / "plan") == numbers(whole)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "ended"])
def test_an_interrupt_ends_it_quietly_and_leaves_nothing(made, whole, capsys, monkeypatch, request, sent, status):
    request.addfinalizer(partial(signal.signal, sent, signal.getsignal(sent)))
    if sent == signal.SIGINT:
        # Ignored where the tests run in the background of a shell script.
        signal.signal(sent, signal.default_int_handler)
    step, seen, handler = RoarModule.training_step, [], signal.getsignal(sent)

    def interrupted(self, *args):
        seen.append(self)
        if len(seen) == 6:
            os.kill(os.getpid(), sent)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RoarModule, "training_step", interrupted)
        with pytest.raises(SystemExit) as end:
            main(["roar", "run", "--plan", str(made)])
    assert end.value.code == status
    said = capsys.readouterr().err
    assert "Stopped; 1 of 6 runs are done. The same command continues." in said
    assert "Traceback" not in said
    assert signal.getsignal(sent) is handler
    assert not rests(made)
    assert not list(made.rglob("error.log"))
    assert len(identities(made)) == 1
    main(["roar", "run", "--plan", str(made)])
    assert numbers(made) == numbers(whole)


def test_the_plan_is_what_its_folder_says(whole):
    assert [run.id for run in read_plan(whole).runs()] == RUNS
