"""A GPU that is only pretended: tensors say that they are on `cuda:0`, and the CPU computes.

A pretended tensor refuses to meet a CPU tensor with axes, as a tensor on a GPU does. `Waits` counts the places where
the host would wait for the stream of a GPU. There is no autocast: torch chooses its casts below Python.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.fabric.accelerators.cuda as fabric_cuda
import lightning.pytorch.accelerators.cuda as lightning_cuda
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
# Torch itself believes this device: its tensors have no storage, and all devices compare in C++.
META = torch.device("meta")
MEMORY = 1 << 20
# Operators whose result has a size or a value that the host reads.
READ = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
COPIES = {"_copy_from", "_to_copy", "copy_", "device_put"}
INDEXED = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
# Types of arguments without pretended tensors, and operators that name a device.
_PLAIN = {Tensor, torch.nn.Parameter, bool, float, int, torch.dtype, type(None)}
_MOVED = ("device_put", "_pin_memory", "is_pinned")
# A function with a device among its keywords.
FACTORIES = {
    *("arange", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tril_indices", "zeros", "zeros_like"),
}
NEW = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}


class Waits(Counter[str]):
    """Number of waits of the host by the line of matex_pl that caused them, or of the first library above it."""

    active: Waits | None = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[Waits]:
        """Count the waits inside of the context."""
        before, Waits.active = Waits.active, self
        try:
            yield self
        finally:
            Waits.active = before


def wait(kind: str) -> None:
    """Count one wait, if waits are counted now."""
    if Waits.active is not None:
        Waits.active[f"{_line()} {kind}"] += 1


def _line() -> str:
    frame, outside = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        place = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        if "/matex_pl/" in path or ("/callbacks/" in path and "lightning" not in path):
            return place
        if not outside and path != __file__ and "/torch/" not in path:
            outside = place
        frame = frame.f_back  # type: ignore[assignment]
    return outside


class Pretended(Tensor):
    """A tensor on the pretended GPU, around the CPU tensor that holds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.size(), **layout, dtype=held.dtype, device=META)
        made.held = held
        return made

    # Another device for tests of Apple's MPS, which has no float64.
    place = CUDA
    device = property(lambda self: Pretended.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return self._read("bool", bool)

    def __int__(self) -> int:
        return self._read("int", int)

    def __float__(self) -> float:
        return self._read("float", float)

    def __index__(self) -> int:
        return self._read("int", int)

    def item(self) -> Any:
        return self._read("item", Tensor.item)

    def tolist(self) -> Any:
        return self._read("tolist", Tensor.tolist)

    def _read(self, kind: str, read: Callable[[Any], Any]) -> Any:
        wait(kind)
        return read(self.held)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("A tensor of the pretended GPU has no array. Copy it to the CPU first.")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.held})"

    def __format__(self, spec: str) -> str:
        return self._read("format", lambda held: format(held, spec))

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_placed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_placed(index), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Any = Pretended(self.held.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def share_memory_(self) -> Pretended:
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Factories of the pretended GPU, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Most operators of the CPU, without a search of their arguments.
        if not kwargs and all(type(part) in _PLAIN for part in args) and not func._schema.name.endswith(_MOVED):
            return func(*args)
        return _run(func, args, kwargs or {})


def held(values: Any) -> Any:
    """The values of pretended tensors, in any nest of lists and dicts, as CPU tensors."""
    return tree_map(lambda value: value.held if isinstance(value, Pretended) else value, values)


def _placed(index: Any) -> Any:
    """An index whose lists are tensors of the GPU, as on a real one: this copies, and waits."""
    if isinstance(index, tuple):
        return tuple(map(_placed, index))
    if not isinstance(index, list):
        return index
    wait("list as index")
    return torch.tensor(index, dtype=torch.long if not index else None, device=CUDA)


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("meta", "cuda", "mps")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the held values; refuse tensors of both devices, and count its wait."""
    name = func._schema.name.split("::")[-1]
    if name == "_fused_sdp_choice":
        return 0
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
    ours = [part for part in tensors if isinstance(part, Pretended)]
    target = args[1] if name == "device_put" else kwargs.get("device")
    if name in ("_pin_memory", "is_pinned"):
        if ours:
            raise RuntimeError("Only dense CPU tensors can be pinned, not one of the pretended GPU.")
        return args[0] if name == "_pin_memory" else False
    if ours and name not in COPIES:
        _refuse_mixture(name, args, tensors)
    if ours:
        _count_wait(name, args, kwargs)
    if name == "copy_":
        into, source = args[:2]
        if isinstance(into, Pretended) != isinstance(source, Pretended) and not _is_free(into, args[2:]):
            wait("to the GPU" if isinstance(into, Pretended) else "to the host")
        held(into).copy_(held(source))
        return into
    is_ours = bool(ours) if target is None else _on_gpu(target)
    is_copy = name in COPIES and target is not None and isinstance(args[0], Pretended) != is_ours
    if is_copy and not (is_ours and kwargs.get("non_blocking")):
        wait("to the GPU" if is_ours else "to the host")
    cpu = torch.device("cpu")
    plain_args, plain_kwargs = held(args), held(kwargs)
    if "device" in kwargs and target is not None:
        plain_kwargs["device"] = cpu
    if name == "device_put":
        plain_args = (plain_args[0], cpu, *plain_args[2:])
    result = func(*plain_args, **plain_kwargs)
    if is_ours and Pretended.place.type == "mps" and getattr(result, "dtype", None) == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    # An operator in place returns the tensors that it changed.
    known = {id(held(part)): part for part in tensors} if func._schema.is_mutable else {}

    def wrapped(part: Any) -> Any:
        if not isinstance(part, Tensor) or isinstance(part, Pretended):
            return part
        return known.get(id(part)) if id(part) in known else Pretended(part) if is_ours else part

    return tree_map(wrapped, result)


def _is_free(into: Any, others: Sequence[Any]) -> bool:
    """Whether a copy is one to the GPU for which the host does not wait."""
    return isinstance(into, Pretended) and any(others)


def _refuse_mixture(name: str, args: Any, tensors: list[Tensor]) -> None:
    others = [part for part in tensors if not isinstance(part, Pretended) and part.device.type == "cpu" and part.ndim]
    values = args[2] if name.startswith(("index_put", "_index_put")) else None
    if others and name in INDEXED and isinstance(args[0], Pretended) and not any(part is values for part in others):
        # Torch copies such an index to the GPU.
        wait("index of the CPU")
    elif others:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got {[tuple(part.shape) for part in others]} of "
            f"the CPU at {_line()}."
        )


def _count_wait(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in READ:
        wait(name)
    elif name in INDEXED and any(getattr(part, "dtype", None) in (torch.bool, torch.uint8) for part in args[1]):
        wait("mask as index")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        wait(name)


def _renamed(device: Any) -> Any:
    """A device as C++ is to see it: `meta` in place of `cuda`."""
    if isinstance(device, str) and device.split(":")[0] in ("cuda", "mps"):
        return META
    return META if isinstance(device, torch.device) and device.type in ("cuda", "mps") else device


class _Nothing(contextlib.ContextDecorator):
    """A context or a stream without effect."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def synchronize(self) -> None:
        wait("synchronize")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Waits]:
    """One GPU is there inside of the context; the waits of the host are counted."""
    # Compiles functions of torch on import, which the replaced ones would disturb.
    importlib.import_module("torch._decomp.decompositions_for_jvp")
    with pytest.MonkeyPatch.context() as patch:
        _replace_cuda(patch)
        _replace_factories(patch)
        _replace_lightning(patch)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Pretending(), Waits().counted() as waits:
                yield waits
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _replace_cuda(patch: pytest.MonkeyPatch) -> None:
    state = {"rng": torch.arange(16, dtype=torch.uint8)}
    properties = {
        "name": "Pretended GPU",
        "major": 9,
        "minor": 0,
        "total_memory": 1 << 37,
        "multi_processor_count": 132,
    }
    answers: dict[str, Any] = {
        "_is_compiled": True,
        "_is_in_bad_fork": False,
        "_lazy_init": None,
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": (9, 0),
        "get_device_name": "Pretended GPU",
        "get_device_properties": SimpleNamespace(**properties),
        "init": None,
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "is_initialized": True,
        "manual_seed": None,
        "manual_seed_all": None,
        "max_memory_allocated": MEMORY,
        "memory_allocated": 0,
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "set_device": None,
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch.cuda, "synchronize", lambda *_: wait("synchronize"))
    patch.setattr(torch.cuda, "get_rng_state", lambda *_: state["rng"].clone())
    patch.setattr(torch.cuda, "set_rng_state", lambda rng, *_: state.update(rng=rng.clone()))
    patch.setattr(torch.cuda, "get_rng_state_all", lambda: [state["rng"].clone()])
    patch.setattr(torch.cuda, "set_rng_state_all", lambda states: state.update(rng=states[0].clone()))
    for name in ("device", "stream", "Stream"):
        patch.setattr(torch.cuda, name, _Nothing)
    for name in ("current_stream", "default_stream"):
        patch.setattr(torch.cuda, name, _Nothing)
    patch.setattr(torch.cuda.graphs, "is_current_stream_capturing", lambda: False)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        patch.setattr(torch.optim.Optimizer, name, lambda *_: None, raising=False)
    patch.setattr(torch, "autocast", _Nothing)
    patch.setattr(torch.amp, "autocast", _Nothing)


def _replace_factories(patch: pytest.MonkeyPatch) -> None:
    def with_device(real: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(real)
        def made(*args: Any, **kwargs: Any) -> Any:
            return real(*args, **{name: _renamed(part) if name == "device" else part for name, part in kwargs.items()})

        return made

    for owner, names in ((torch, FACTORIES), (Tensor, NEW)):
        for name in names:
            patch.setattr(owner, name, with_device(getattr(owner, name)))
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return move(self, *map(_renamed, args), **{name: _renamed(part) for name, part in kwargs.items()})

    patch.setattr(Tensor, "to", to)
    patch.setattr(Tensor, "cuda", lambda self, *_, **kwargs: to(self, CUDA, **kwargs))
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, partial(_made_from, getattr(torch, name)))


def _made_from(real: Callable[..., Tensor], data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    if isinstance(data, Pretended):
        return data if device is None or _on_gpu(device) else held(data)
    if isinstance(data, (list, tuple)):
        data = tree_map(lambda part: part.item() if isinstance(part, Pretended) else part, data)
    made = real(data, *args, **kwargs)
    if not _on_gpu(device):
        return made
    wait("to the GPU")
    return Pretended(made)


def _replace_lightning(patch: pytest.MonkeyPatch) -> None:
    modules: list[ModuleType] = [fabric_cuda, lightning_cuda]
    for module in modules:
        for name, answer in {
            "num_cuda_devices": 1,
            "is_cuda_available": True,
            "_check_cuda_matmul_precision": None,
            "_clear_cuda_memory": None,
        }.items():
            patch.setattr(module, name, lambda *_, answer=answer: answer, raising=False)
    accelerator = lightning_cuda.CUDAAccelerator
    for name, answer in {"is_available": True, "auto_device_count": 1, "set_nvidia_flags": None}.items():
        patch.setattr(accelerator, name, staticmethod(lambda *_, answer=answer: answer))
    # The structure that pinning returns, without pinned memory.
    patch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", _as_pinned)


def _as_pinned(data: Any, device: Any = None) -> Any:
    if isinstance(data, dict):
        return {name: _as_pinned(part) for name, part in data.items()}
    return [_as_pinned(part) for part in data] if isinstance(data, (list, tuple)) else data
