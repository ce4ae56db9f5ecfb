"""Rules of the Trainer's settings, checked before the model is built, with messages in the words of the options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from matex_pl.arguments import nearest


class Rule(NamedTuple):
    """Rule of a setting: a test of its value, and the valid values in words."""

    fits: Callable[[Any], bool]
    valid: str


def _at_least(bound: int, valid: str) -> Rule:
    return Rule(lambda value: value >= bound, valid)


_BATCHES = Rule(
    lambda value: value >= 0 if isinstance(value, int) else 0 <= value <= 1,
    "a number of batches from 0, or a share of them between 0.0 and 1.0",
)
_RULES = {
    "accumulate_grad_batches": _at_least(1, "a number of batches from 1"),
    "check_val_every_n_epoch": _at_least(1, "a number of epochs from 1, or null with a val_check_interval in batches"),
    "fast_dev_run": _at_least(0, "a number of batches from 0, or true or false"),
    "gradient_clip_algorithm": Rule(lambda value: value in ("norm", "value"), "norm or value"),
    "gradient_clip_val": _at_least(0, "a number from 0, or null for none"),
    "limit_predict_batches": _BATCHES,
    "limit_test_batches": _BATCHES,
    "limit_train_batches": Rule(
        lambda value: _BATCHES.fits(value) and value > 0,
        "a number of batches from 1, or a share of them above 0.0 and up to 1.0",
    ),
    "limit_val_batches": _BATCHES,
    "log_every_n_steps": _at_least(0, "a number of steps from 0"),
    "max_epochs": _at_least(-1, "a number of epochs from 0, -1 for no limit, or null"),
    "max_steps": _at_least(-1, "a number of steps from 0, or -1 for no limit"),
    "min_epochs": _at_least(0, "a number of epochs from 0, or null"),
    "min_steps": _at_least(0, "a number of steps from 0, or null"),
    "num_nodes": _at_least(1, "a number of machines from 1"),
    "num_sanity_val_steps": _at_least(-1, "a number of batches from 0, or -1 for all"),
    "overfit_batches": _BATCHES,
    "profiler": Rule(
        lambda value: not isinstance(value, str) or value in ("simple", "advanced", "pytorch", "xla"),
        "one of simple, advanced, pytorch, xla, or null",
    ),
    "reload_dataloaders_every_n_epochs": _at_least(0, "a number of epochs from 0"),
    "val_check_interval": Rule(
        # Other values are times, such as "00:01:00:00".
        lambda value: value >= 1 if isinstance(value, int) else not isinstance(value, float) or 0 < value <= 1,
        "a number of batches from 1, or a share of an epoch above 0.0 and up to 1.0",
    ),
}


def check_trainer(settings: Mapping[str, Any], words: Sequence[str]) -> None:
    """Check the settings of a Trainer before anything is built.

    Args:
        settings: Settings by name, as the parser has read them.
        words: Words of the command line.

    Raises:
        ValueError: A setting breaks a rule; the message names the option, its value, the rule and the way out.
    """
    for name, rule in _RULES.items():
        value = settings.get(name)
        if value is not None and not rule.fits(value):
            _refuse(name, value, rule.valid, words)
    strategy, known = settings.get("strategy"), ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
        valid = "auto or the name of one of Lightning's strategies, such as ddp"
        _refuse("strategy", strategy, valid, words, nearest(strategy, known))
    accelerator, devices = settings.get("accelerator") or "auto", settings.get("devices")
    if not isinstance(accelerator, str):
        return
    here = {name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()}
    if accelerator not in {"auto", *here, *({"gpu"} if here & {"cuda", "mps"} else ())}:
        kinds = sorted({"auto", "gpu", *AcceleratorRegistry})
        reason = " This machine, or its installation of torch, has no such device." if accelerator in kinds else ""
        valid = f"auto or {' or '.join(sorted(here))}" if reason else f"one of {', '.join(kinds)}"
        _refuse("accelerator", accelerator, valid, words, reason)
    if accelerator == "cpu" or here == {"cpu"}:
        if devices not in ("auto", None) and not (str(devices).isdecimal() and int(devices)):
            _refuse("devices", devices, "a number of processes from 1, or auto, on the CPU", words)
    elif devices in (0, "0", [], ""):
        _refuse("devices", devices, "a number of devices from 1, -1 or auto for all, or a list of indices", words)


def _refuse(name: str, value: object, valid: str, words: Sequence[str], more: str = "") -> NoReturn:
    option = f"--trainer.{name}"
    where = "" if any(word.partition("=")[0] == option for word in words) else " in the config"
    raise ValueError(f"{option}{where} must be {valid}, got {value!r}.{more}")
