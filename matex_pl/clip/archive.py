"""Tensors of a torch archive, without the code that it names: inert objects replace all classes and functions."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """Object whose class or function an archive names. It is not imported or called; only a given state is kept."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """An object without content, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Drop the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keep the state: attributes of a TorchScript module, for example."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop an item of a dict."""

    def append(self, item: Any) -> None:
        """Drop an item of a list."""

    def extend(self, items: Any) -> None:
        """Drop items of a list."""


class _Rebuild:
    """One of torch's functions that rebuild tensors. A function could be changed by a pickle, this object cannot."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the file changes a function of torch")


class _Tensor(_Rebuild):
    __slots__ = ()

    def __call__(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return torch.empty(0, dtype=storage.dtype).set_(storage.untyped_storage(), offset, size, stride)


class _Parameter(_Rebuild):
    __slots__ = ()

    def __call__(self, data: Tensor, *_: Any) -> Tensor:
        return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that finds nothing but torch's tensors and `OrderedDict`; all other names become `Inert`."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"), encoding="utf-8")
        self.archive, self.root = archive, root
        self.mapped: Any = None
        # In the order of their appearance.
        self.skipped: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The object for a name of the file. Nothing is imported."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        self.skipped[f"{module}.{name}"] = None
        return Inert

    def persistent_load(self, pid: Any) -> Tensor:
        """Values of one storage `(n,)`, mapped from the disk."""
        kind, dtype, key, _, _ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("the file holds tensors of an unknown type")
        info, path = self.archive.getinfo(f"{self.root}/data/{key}"), Path(str(self.archive.filename))
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("the tensors of the file are compressed")
        with path.open("rb") as file:
            # The data follow a header of 30 bytes, the name, and padding.
            file.seek(info.header_offset + 26)
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if self.mapped is None:
                self.mapped = torch.UntypedStorage.from_file(str(path), False, file.seek(0, 2))
        return torch.empty(0, dtype=dtype).set_(self.mapped[start : start + info.file_size])


def read_archive(path: str) -> tuple[Any, list[str]]:
    """Content of an archive of `torch.save` or TorchScript, and the names of the classes and functions left out.

    Tensors are mapped from the disk. An object of a class becomes `Inert`.

    Raises:
        Exception: The file is no such archive, or a tensor depends on a class or function.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            raise pickle.UnpicklingError("the file has another byte order")
        unpickler = _Unpickler(archive, root)
        return unpickler.load(), list(unpickler.skipped)


def module_state(module: Inert, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a TorchScript module and its parts by their dotted names."""
    state: dict[str, Tensor] = {}
    for name, value in module.state.items() if isinstance(module.state, dict) else ():
        if isinstance(value, Inert):
            state |= module_state(value, f"{prefix}{name}.")
        # The causal mask is a constant.
        elif isinstance(value, Tensor) and name != "attn_mask":
            state[f"{prefix}{name}"] = value
    return state
