"""Atomic writes of files, checks of outputs and of YAML files, and the shipped configs."""

from __future__ import annotations

import json
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar
from uuid import uuid4

import yaml

_ABANDONED_AFTER = 3600
# A disk with less room is full: the smallest output is a picture of this size.
_ROOM = 2**16
# Part of an earlier output that is read to recognize it.
_HEAD = 4096
# Limits of a YAML file: bytes, levels, and values after its aliases are expanded. The shipped configs have 200 values.
_YAML_BYTES, _YAML_DEPTH, _YAML_VALUES = 2**20, 50, 100_000

CONFIG_FOLDER = Path(__file__).parent / "configs"
MARK = "matex_pl"
"""Name that pictures and pages of this package carry in their metadata, by which `check_output` recognizes them."""


@contextmanager
def whole_file(path: Path, parts: Path | None = None) -> Iterator[Path]:
    """Context with a temporary file that is renamed to `path` at the end: readers see the old file or the new one.

    The parent folders are created. After an exception the temporary file is removed, and `path` is unchanged.

    Args:
        path: Destination.
        parts: Folder of the temporary file, on the same disk as `path`; by default the folder of `path`.

    Raises:
        OSError: The file cannot be written; `filename` is `path`.
    """
    part = (parts or path.parent) / f".{path.name}.{uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        # A full disk has no file name, and the temporary name says nothing to a user.
        if error.errno and error.filename in (None, str(part), part):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Context with a temporary folder that is renamed to `path` at the end; a folder that is there is replaced.

    The parent folders are created. After an exception the temporary folder is removed, and `path` is unchanged. The
    temporary folders of killed processes are removed too; see `remove_abandoned_parts`.

    Raises:
        OSError: The folder cannot be written; `filename` is `path`.
    """
    part = path.absolute().parent / f".{path.name}.{uuid4().hex}.part"
    old = part.with_suffix(".old")
    remove_abandoned_parts(part.parent, escape(path.name))
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.replace(old)
        part.replace(path)
    except OSError as error:
        # The temporary name says nothing to a user.
        if error.errno and (error.filename is None or str(error.filename).startswith(str(part))):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        # Without a new folder, an error or an interruption came between the two names.
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(old, ignore_errors=True)


def remove_abandoned_parts(folder: Path, name: str = "*") -> None:
    """Remove temporary files and folders of killed processes, if they have not changed for an hour.

    Args:
        folder: Folder that holds them.
        name: Pattern of the names of the files or folders that were written.
    """
    for part in folder.glob(f".{name}.*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; see `whole_file`."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Value of a JSON file of this package.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged, for example by a full disk.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {path} is damaged. Delete the file, and run its command again.") from error


def check_folder(folder: Path) -> None:
    """Raise OSError if no file can be written in a folder, which need not exist. The check leaves nothing behind."""
    try:
        existing = next((path for path in (folder, *folder.parents) if path.is_symlink() or path.exists()), folder)
        with TemporaryFile(dir=existing) as file:
            # A full disk still takes an empty file.
            file.write(bytes(_ROOM))
            file.flush()
    except OSError as error:
        raise OSError(f"Nothing can be written in {folder}: {error.strerror}. Give another folder.") from error


def check_room(folder: Path, size: int) -> None:
    """Raise OSError if the disk of a folder, which need not exist, has less room than `size` bytes."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(
            f"The files in {folder} need {size / 2**20:,.1f} MiB, and the disk has {free / 2**20:,.1f} MiB left. Make "
            "room on the disk, or give a folder on another disk."
        )


@contextmanager
def new_files_removed(
    folders: Iterable[Path], names: Iterable[str], is_refused: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Context that leaves nothing behind after an exception: removes the new files of folders, and the new folders.

    A folder with a new file of another name keeps all of its files.

    Args:
        folders: Folders that need not exist. Missing parents count as new folders too.
        names: Patterns of the names of files that may be removed.
        is_refused: Function that is called after an exception; with False, everything stays.
    """
    folders, names = list(folders), list(names)
    before = {path for folder in folders for path in folder.rglob("*")}
    missing = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        for folder in folders if is_refused() else ():
            new = sorted(set(folder.rglob("*")) - before, reverse=True)
            files = [path for path in new if not path.is_dir()]
            if all(any(fnmatch(path.name, name) for name in names) for path in files):
                for path in files:
                    path.unlink()
                for path in new:
                    if path not in files:
                        path.rmdir()
        for path in missing if is_refused() else ():
            # A folder with files stays.
            with suppress(OSError):
                path.rmdir()
        raise


def check_output(path: Path, mark: str = MARK, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check an output before the work: the file can be written, and replaces at most an earlier output of its kind.

    Args:
        path: Destination, which need not exist.
        mark: Text in the first 4 KB of every earlier output of this kind.
        inputs: Files that this run reads; None stands for no file.

    Raises:
        OSError: Nothing can be written in the folder.
        ValueError: The path is a folder, a link, a device, a pipe or a socket, or a file of another kind, or an input.
    """
    check_folder(path.parent)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFLNK: "a link",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
    }
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"The output {str(path)!r} is {kinds.get(stat.S_IFMT(mode), 'no file')}. Give the path of a file."
        )
    if any(name is not None and Path(name).exists() and path.samefile(name) for name in inputs):
        raise ValueError(f"The output {str(path)!r} is an input of this command. Give another path.")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head and mark.encode() not in head:
        raise ValueError(
            f"The file {str(path)!r} is not replaced, because it is no earlier output of this command. Give another "
            "path, or remove the file."
        )


def check_outputs(folder: Path, marks: Mapping[str, str]) -> None:
    """`check_output` for the files of a folder: marks by file name.

    Raises:
        OSError: Nothing can be written in the folder.
        ValueError: As in `check_output`.
    """
    check_folder(folder)
    for name, mark in marks.items():
        check_output(folder / name, mark)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping of a YAML file, read without running code.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is no YAML, is empty, holds no mapping, or breaks a rule of `parse_yaml`.
    """
    with Path(path).open("rb") as file:
        content = file.read(_YAML_BYTES + 1)
    if len(content) > _YAML_BYTES:
        raise ValueError(f"{path} is no config: the file has more than {_YAML_BYTES:,} bytes.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no YAML: the file is binary, or its encoding is not UTF-8.") from None
    try:
        value = parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        # The end of the file is below its last line.
        line = min(error.problem_mark.line if error.problem_mark else 0, max(len(text.splitlines()) - 1, 0))
        raise ValueError(f"{path}, line {line + 1}: {_yaml_fault(error, text, line)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: the file is binary.") from error
    if value is None:
        raise ValueError(f"{path} is empty. Write the settings into the file.")
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no settings. A YAML of settings maps names to values, as in `lr: 1.0e-5`.")
    return value


def parse_yaml(text: str) -> Any:
    """Value of a YAML text.

    Raises:
        yaml.YAMLError: The text is no YAML, or has a tag, a repeated name, too many levels, or aliases that expand to
            too many values.
    """
    check_yaml(text)
    return yaml.load(text, Loader=_Loader)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    # Dates stay text: no setting is a date.
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _RefusedYamlError(yaml.MarkedYAMLError):
    """Error of a rule of this package. Its `problem` is a finished sentence."""


def _yaml_fault(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    if isinstance(error, _RefusedYamlError):
        return str(error.problem)
    if re.match(r" *\t", "".join(text.splitlines()[line : line + 1])):
        return "The line is indented with a tab. Indent with spaces."
    return "The line is no YAML. Check the indentation, colons, brackets and quotes of this line and the line above."


@dataclass
class _Collection:
    """Mapping or sequence that is still open: its anchor, number of values, and the names of a mapping."""

    anchor: str | None
    is_mapping: bool
    values: int = 1
    items: int = 0
    names: set[str] = field(default_factory=set)


def check_yaml(text: str) -> None:
    """Check a YAML text without building its values.

    Raises:
        yaml.YAMLError: As in `parse_yaml`.
    """
    opened: list[_Collection] = []
    # Number of values by anchor.
    sizes: dict[str, int] = {}
    events: Any = yaml.parse(text, Loader=_Loader)
    for event in events:
        problem, size, name = "", 1, None
        anchor, tag, mark = getattr(event, "anchor", None), getattr(event, "tag", None), event.start_mark
        if tag:
            problem = f"The tag {tag!r} is not accepted. Write values without tags."
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append(_Collection(anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(opened) <= _YAML_DEPTH:
                continue
            problem = f"The values are nested in more than {_YAML_DEPTH} levels."
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            anchor, size = closed.anchor, closed.values
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(str(anchor), 0)
            if not size:
                problem = f"The alias *{anchor} has no complete value above it."
        elif isinstance(event, yaml.ScalarEvent):
            name = event.value
        else:
            continue
        if anchor and not isinstance(event, yaml.AliasEvent):
            sizes[anchor] = size
        if opened:
            parent = opened[-1]
            parent.values += size
            parent.items += 1
            if parent.values > _YAML_VALUES:
                problem = f"The aliases expand to more than {_YAML_VALUES:,} values."
            # Names and values of a mapping alternate.
            if parent.is_mapping and parent.items % 2 and name is not None:
                if name in parent.names:
                    problem = f"The name {name!r} stands twice in this section. Keep one of the two."
                parent.names.add(name)
        if problem:
            raise _RefusedYamlError(problem=problem, problem_mark=mark)


def find_config(path: str) -> Path | None:
    """Path of a config: the given file, or else the shipped config of this name, with or without `configs/` in front.

    None if there is neither.
    """
    candidate = Path(path)
    if candidate.is_file():
        return candidate
    shipped = CONFIG_FOLDER / path.removeprefix("configs/")
    return shipped if not candidate.is_absolute() and shipped.is_file() else None


def shipped_configs() -> list[str]:
    """Names of the YAML configs that are installed with the package."""
    return sorted(path.name for path in CONFIG_FOLDER.glob("*.yaml"))
