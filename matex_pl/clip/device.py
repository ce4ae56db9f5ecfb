"""Device of a command or a training, by its option."""

from __future__ import annotations

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")


def find_device(name: str) -> torch.device:
    """Device of an option: `auto` is a GPU of CUDA if there is one, else the CPU; `cpu` never asks CUDA.

    Raises:
        ValueError: There is no such device.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be {', '.join(DEVICES[:-1])} or {DEVICES[-1]}, got {name!r}.")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda" or (name == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(
            f"device is {name!r}, but torch finds no such GPU here. Give auto, which uses a GPU of CUDA if there is "
            "one, or cpu."
        )
    return torch.device("cpu" if name == "auto" else name)


def uses_cuda(accelerator: str) -> bool:
    """Whether Lightning's accelerator of this name is a GPU of CUDA here."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def synchronize(device: torch.device) -> None:
    """Wait for the work of a device; clocks need it before they start and before they stop."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def random_state(device: torch.device) -> torch.Tensor | None:
    """State of the random numbers of a GPU, a CPU tensor; None for the CPU, whose state torch keeps by itself."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def set_random_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore a `random_state` of the same kind of device."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
