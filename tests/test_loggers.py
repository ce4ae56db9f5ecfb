import inspect

import numpy as np
import pytest
from lightning.fabric.loggers import TensorBoardLogger as FabricTensorBoardLogger
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from matex_pl.callbacks.loggers import log_image, log_images, log_session, log_text


class Recorder:
    def __init__(self):
        self.calls = []

    def log_image(self, *args, **kwargs):
        self.calls.append((args, kwargs))

    log_text = log_image


class MlflowStandIn(MLFlowLogger):
    """Lightning's logger over a client that only remembers, for lack of the package."""

    experiment = Recorder()
    run_id = "run"

    def __init__(self):
        pass


class CometStandIn(CometLogger):
    """The same for Comet."""

    experiment = Recorder()

    def __init__(self):
        pass


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [TensorBoardLogger, FabricTensorBoardLogger])
def test_tensorboard_event_reads_back(tmp_path, image, kind):
    logger = kind(tmp_path)
    assert log_image(logger, "maps/val/pair-1", image, 120)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (event,) = events.Images("maps/val/pair-1")
    assert (event.step, event.height, event.width) == (120, 20, 30)


def test_csv_takes_no_pictures(tmp_path, image):
    assert log_image(CSVLogger(tmp_path), "maps", image, 1) is False


def test_logger_with_lightnings_convention(image):
    logger = Recorder()
    assert log_image(logger, "maps", image, 7)
    ((args, kwargs),) = logger.calls
    assert args == ()
    assert (kwargs["key"], kwargs["step"]) == ("maps", 7)
    assert kwargs["images"][0] is image
    inspect.signature(WandbLogger.log_image).bind(logger, **kwargs)


def test_mlflow_and_comet_get_their_own_arguments(image):
    assert log_images([MlflowStandIn(), CometStandIn()], "maps/val", image, 7) == 2
    assert MlflowStandIn.experiment.calls == [(("run", image), {"artifact_file": "maps/val/000000007.png"})]
    (((picture,), kwargs),) = CometStandIn.experiment.calls
    assert isinstance(picture, Image.Image)
    np.testing.assert_array_equal(np.array(picture), image)
    assert kwargs == {"name": "maps/val", "step": 7}


def test_log_images_counts_those_that_took_it(tmp_path, image):
    assert log_images([CSVLogger(tmp_path), Recorder(), Recorder()], "maps", image, 1) == 2
    assert log_images([], "maps", image, 1) == 0


@pytest.mark.parametrize("wrong", [np.zeros((20, 30), np.uint8), np.zeros((3, 20, 30), np.uint8), np.zeros((2, 2, 3))])
def test_wrong_pictures_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\(h, w, 3\) uint8, got"):
        log_image(Recorder(), "maps", wrong, 1)


@pytest.mark.parametrize("kind", [TensorBoardLogger, FabricTensorBoardLogger])
def test_texts_read_back_from_tensorboard(tmp_path, kind):
    logger = kind(tmp_path)
    assert log_text(logger, "roar/table", "| a |", 5)
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir).Reload().Tensors("roar/table/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (5, b"| a |")


def test_texts_to_other_loggers(tmp_path, monkeypatch):
    for stand_in in (MlflowStandIn, CometStandIn):
        monkeypatch.setattr(stand_in, "experiment", Recorder())
        assert log_text(stand_in(), "roar/table", "| a |", 5)
    assert MlflowStandIn.experiment.calls == [(("run", "| a |"), {"artifact_file": "roar/table.md"})]
    assert CometStandIn.experiment.calls == [(("| a |",), {"step": 5, "metadata": {"name": "roar/table"}})]
    logger = Recorder()
    assert log_text(logger, "roar/table", "| a |", 5)
    ((args, kwargs),) = logger.calls
    assert (args, kwargs["data"]) == ((), [["| a |"]])
    inspect.signature(WandbLogger.log_text).bind(logger, **kwargs)
    assert log_text(CSVLogger(tmp_path), "roar/table", "| a |", 5) is False


@pytest.mark.parametrize("kind", [TensorBoardLogger, FabricTensorBoardLogger])
def test_a_session_is_a_run_of_its_own(tmp_path, kind):
    logger = kind(tmp_path)
    logger.log_hyperparams({"lr": 0.5})
    logger.experiment.flush()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert log_session(logger, "roar", {"epochs": 3}, {"roar/mean": 2.0})
    assert {path: path.read_bytes() for path in before} == before
    events = EventAccumulator(f"{logger.log_dir}/roar").Reload()
    assert [event.value for event in events.Scalars("roar/mean")] == [2.0]
    assert log_session(CSVLogger(tmp_path), "roar", {}, {}) is False
