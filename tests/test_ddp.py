"""Two processes do what one does: losses, gradients, weights, scores, panels, predictions, checkpoints."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matex_pl import ClipModule
from matex_pl.cli import main
from matex_pl.evaluation.tensors import read_head, read_tensors
from matex_pl.training.loss import gathered_loss

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that `two_processes.py` writes."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, str(HERE / "two_processes.py"), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _kept(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("ways", ["True-True", "False-True"])
@pytest.mark.parametrize("loss", ["softmax-positive", "softmax-masked", "sigmoid-positive", "sigmoid-masked"])
def test_loss_and_gradients_are_those_of_the_whole_batch(found: Path, loss: str, ways: str) -> None:
    expected = _json(found / "loss.json")[loss]
    for rank in range(2):
        for ours, whole in zip(_json(found / f"loss_{rank}.json")[f"{loss}-{ways}"], expected, strict=True):
            assert np.array(ours) == pytest.approx(np.array(whole), abs=1e-12)


@pytest.mark.parametrize("name", ["softmax-positive", "sigmoid-positive"])
def test_without_gathered_gradients_the_towers_learn_half(found: Path, name: str) -> None:
    loss, weight, *scalars = (np.array(value) for value in _json(found / "loss_0.json")[f"{name}-False-False"])
    whole = [np.array(value) for value in _json(found / "loss.json")[name]]
    assert loss == pytest.approx(whole[0])
    assert 2 * weight == pytest.approx(whole[1], abs=1e-12)
    assert np.array(scalars) == pytest.approx(np.array(whole[2:]))


def test_batches_of_different_size_are_refused_everywhere(found: Path) -> None:
    for rank in range(2):
        assert "batches of 3, 4 pairs" in _json(found / f"loss_{rank}.json")["uneven"]


def test_training_is_that_of_one_process_with_both_batches(found: Path) -> None:
    losses = [_json(found / f"fit{count}.losses") for count in (1, 2)]
    assert len(losses[0]) >= 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    one, two = (_kept(found / f"fit{count}.pt")["weights"] for count in (1, 2))
    _assert_close(two, one)


def test_adapters_guidance_and_the_sigmoid_loss_train_as_in_one_process(found: Path) -> None:
    losses = [_json(found / f"options{count}.losses") for count in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9)
    one, two = (_kept(found / f"options{count}.pt") for count in (1, 2))
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in one["weights"].items())
    _assert_close(two["weights"], one["weights"])
    assert two["scores"]["val/loss"] == pytest.approx(one["scores"]["val/loss"], abs=1e-6)
    for name in ("train/guidance_loss", "train/energy_in_box", "train/guided_share"):
        assert one["scores"][name] > 0
        assert two["scores"][name] == pytest.approx(one["scores"][name], abs=1e-6)


def _assert_close(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], atol=2e-6, rtol=0, check_dtype=False)


def test_scores_count_each_pair_once(found: Path) -> None:
    one, two = (_kept(found / f"fit{count}.pt")["scores"] for count in (1, 2))
    assert {"val/loss", "val/zero_shot_auroc", "attribution/cnr", "attribution/consistency_mean"} <= set(one)
    assert any(name.startswith("attribution/pointing_game/") for name in one)
    assert two == pytest.approx(one, abs=1e-5)
    # Shards of an odd number of pairs are filled up.
    assert len(_store(found / "maps1")) % 2 == 1


def test_findings_that_one_process_sees_are_logged_by_both(found: Path) -> None:
    one, two = (_kept(found / f"some{count}.pt")["scores"] for count in (1, 2))
    assert sum(name.startswith("attribution/pointing_game/") for name in one) > 3
    assert two == pytest.approx(one, abs=1e-5, nan_ok=True)


def test_a_foreign_training_logs_the_same_scalars(found: Path) -> None:
    one, two = (_kept(found / f"foreign{count}.pt") for count in (1, 2))
    _assert_close(two["weights"], one["weights"])
    scores = [{name: value for name, value in kept["scores"].items() if "attribution" in name} for kept in (one, two)]
    assert len(scores[0]) > 6
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["fit", "foreign"])
def test_panels_are_logged_once_and_are_the_same(found: Path, kind: str) -> None:
    logs = [
        EventAccumulator(str(found / f"{kind}{count}" / "tb" / "0"), size_guidance={"images": 0}).Reload()
        for count in (1, 2)
    ]
    tags = [set(log.Tags()["images"]) for log in logs]
    assert tags[0] == tags[1]
    assert len(tags[0]) == 3
    for tag in tags[0]:
        one, two = (log.Images(tag) for log in logs)
        assert [event.step for event in one] == [event.step for event in two]
        assert len(one) == 2
        for ours, other in zip(one, two, strict=True):
            pictures = [cv2.imdecode(np.frombuffer(e.encoded_image_string, np.uint8), 1) for e in (ours, other)]
            assert np.abs(pictures[0].astype(int) - pictures[1]).mean() < 0.01


def _rows(found: Path, count: int) -> list[dict[str, str]]:
    with (found / f"fit{count}" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_one_table_in_the_order_of_the_images(found: Path) -> None:
    one, two = _rows(found, 1), _rows(found, 2)
    assert [row["id"] for row in two] == [row["id"] for row in one]
    assert [float(row["cosine"]) for row in two] == pytest.approx([float(row["cosine"]) for row in one], abs=1e-6)


def _store(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The maps of a folder by pair, each of which is in one file only."""
    maps: dict[str, dict[str, torch.Tensor]] = {}
    for path in (folder / "maps").rglob("*.safetensors"):
        tensors, about = read_tensors(path)
        for row, key in enumerate(about["pairs"]):
            assert key not in maps
            maps[key] = {name: value[row] for name, value in tensors.items()}
    return maps


def _explained(folder: Path, log: str = "log") -> list[str]:
    return (folder / log).read_text(encoding="utf-8").splitlines()


def _assert_same_maps(found: Path, name: str) -> None:
    ours, whole = _store(found / name), _store(found / "maps1")
    assert ours.keys() == whole.keys()
    for key, fields in whole.items():
        for field, value in fields.items():
            torch.testing.assert_close(ours[key][field], value, atol=1e-6, rtol=0)


def test_maps_of_two_processes_are_one_store(found: Path) -> None:
    pairs = len(_explained(found / "maps1"))
    assert len(_store(found / "maps1")) == pairs
    # One of them was explained twice, to fill up a shard, and is kept once.
    assert len(_explained(found / "maps2")) == pairs + 1
    _assert_same_maps(found, "maps2")
    batches = -(-pairs // 4)
    assert len(list((found / "maps2").rglob("*.safetensors"))) in (2 * batches - 1, 2 * batches)


def test_killed_while_a_map_is_written(found: Path) -> None:
    folder = found / "killed"
    assert "SIGKILL" in (folder / "error").read_text(encoding="utf-8")
    first = _json(folder / "first")
    assert len(first) == 1
    [half] = [path for path in (folder / "maps").rglob("*") if path.suffix == ".part"]
    with pytest.warns(UserWarning, match="is damaged"):
        assert read_head(half) is None
    assert Path(first[0]).is_file()
    # By two processes then, and only what is missing.
    assert len(_explained(folder)) + 4 in (len(_store(found / "maps1")), len(_store(found / "maps1")) + 1)
    _assert_same_maps(found, "killed")


def test_a_full_disk_while_maps_are_written(found: Path) -> None:
    folder = found / "full"
    assert "File too large" in (folder / "error").read_text(encoding="utf-8")
    assert _json(folder / "first") == []
    assert not list((folder / "maps").rglob("*.part"))
    assert len(_explained(folder, "first_log")) == 4
    _assert_same_maps(found, "full")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_checkpoints_change_between_one_and_two_processes(found: Path, before: int, after: int) -> None:
    resumed = _kept(found / f"resume{before}{after}.pt")
    whole = _kept(found / "fit1.pt")
    _assert_close(resumed["weights"], whole["weights"])
    for name, value in resumed["scores"].items():
        assert value == pytest.approx(whole["scores"][name], abs=1e-5)


@pytest.mark.parametrize("before", [1, 2])
def test_a_checkpoint_within_an_epoch_is_resumed_by_two_processes(found: Path, before: int) -> None:
    whole = _json(found / f"fit{before}.losses")
    batches = len(whole) // 2
    assert batches > 1
    assert _json(found / f"within{before}.losses") == pytest.approx(whole[batches + 1 :], abs=1e-7)
    _assert_close(_kept(found / f"within{before}.pt")["weights"], _kept(found / f"fit{before}.pt")["weights"])


def test_two_processes_do_not_leave_out_an_image_within_an_epoch(found: Path) -> None:
    said = (found / "skip" / "error").read_text(encoding="utf-8")
    assert "5.png" in said
    assert "With several processes, on_bad_row: skip cannot leave out a pair" in said
    assert not list((found / "skip").rglob("*.ckpt"))


def test_each_process_goes_on_with_its_own_random_numbers(found: Path) -> None:
    draws = {
        (name, rank): (found / name / f"draws_{rank}.txt").read_text(encoding="utf-8")
        for name in ("whole", "resumed")
        for rank in range(2)
    }
    for rank in range(2):
        assert draws["resumed", rank] == draws["whole", rank]
    assert not set(draws["whole", 0].split()) & set(draws["whole", 1].split())
    whole, resumed = (_kept(found / f"{name}.pt")["weights"] for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_image_that_is_no_number_to_one_process_stops_both(found: Path) -> None:
    message, bad = ((found / "nan" / name).read_text(encoding="utf-8") for name in ("error", "bad"))
    assert "FloatingPointError: The loss is nan in epoch 0 at step 1" in message
    assert f"The embeddings of {bad} are not finite." in message
    assert message.partition("with the pairs ")[2].partition(".")[0].count(",") == 7
    state = _kept(found / "nan" / "before_nan-epoch=0-step=1.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_remove_and_retrain_is_planned_and_left_to_its_command(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not (found / "roar" / "runs").exists()
    main(["roar", "run", "--plan", str(found / "roar"), "--shard", "0/9"])
    assert "These runs are done; 8 runs of the plan are left." in capsys.readouterr().out


def test_the_way_to_gather_that_is_wrong_is_refused(tiny_json: str) -> None:
    with pytest.raises(ValueError, match=r"local_loss=True with gather_with_grad=False .* Set local_loss=False"):
        ClipModule(tiny_json, gather_with_grad=False)
    assert ClipModule(tiny_json, local_loss=False, gather_with_grad=False).hparams["local_loss"] is False


def test_a_process_alone_gathers_nothing() -> None:
    image, text = torch.eye(3), torch.eye(3)
    found = gathered_loss(image, text, torch.tensor(4.0), ["a", "b", "c"])
    assert float(found) == pytest.approx(float(torch.nn.functional.cross_entropy(4 * torch.eye(3), torch.arange(3))))


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_cut_weights_up_are_refused(tiny_json: str, kind: type) -> None:
    module = ClipModule(tiny_json)
    # Each needs a GPU or a package to be made; only what it is counts here.
    strategy = kind.__new__(kind)
    module.trainer = SimpleNamespace(strategy=strategy, world_size=2)  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match=rf"{kind.__name__} keeps a part .* Set trainer\.strategy=ddp"):
        module.setup("fit")


def _launched(folder: Path, *launcher: str) -> dict[str, Any]:
    """The checkpoint of a training of the command line on two processes."""
    words = [
        *("fit", f"--model.name={HERE / 'tiny.json'}", "--model.warmup_steps=1"),
        *("--data=matex_pl.data.PhantomDataModule", "--data.num_train=12", "--data.num_val=5", "--data.num_test=2"),
        *(
            "--data.stored_size=64",
            "--data.batch_size=4",
            "--data.num_workers=0",
            f"--data.root={folder.parent / 'images'}",
        ),
        *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
    ]
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "matex_pl.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = folder.rglob("*.ckpt")
    return _kept(path)


@pytest.fixture(scope="module")
def launched_by_lightning(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What the command line trains when it starts the second process itself, and the folder of its images' folder."""
    folder = tmp_path_factory.mktemp("launched")
    return _launched(folder / "lightning"), folder


@pytest.mark.slow
def test_the_command_line_trains_on_two_processes(launched_by_lightning: tuple[dict[str, Any], Path]) -> None:
    checkpoint, folder = launched_by_lightning
    assert checkpoint["rng_state"].shape[0] == 2
    assert not torch.equal(*checkpoint["rng_state"])
    # Beside it stands the empty file of its lock.
    assert len(list((folder / "images").glob("[!.]*"))) == 1


@pytest.mark.slow
def test_torchrun_trains_the_same(launched_by_lightning: tuple[dict[str, Any], Path]) -> None:
    expected, folder = launched_by_lightning
    found = _launched(folder / "torchrun", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert found["global_step"] == expected["global_step"] == 2
    assert torch.equal(found["rng_state"], expected["rng_state"])
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, atol=1e-6, rtol=0, equal_nan=True)
