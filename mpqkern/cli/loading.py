"""Models and data by name: module:callable or path/file.py:callable, called without arguments."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import tensorfile
from ..catalog import batches_of

FORM = "module:callable or path/file.py:callable"


def find(option: str, text: str, arguments: int = 0) -> Any:
    """The callable that `text` names; it has to take so many arguments."""
    where, colon, name = text.rpartition(":")
    shown = relative(text)
    if not colon or not where or not name:
        raise ValueError(f"{option} {shown}: wanted {FORM}")
    found: Any = _file(option, Path(where)) if where.endswith(".py") else _module(option, where)
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n, value in vars(found).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{option} {shown}: {relative(where)} has no {part!r}{_close(part, names)}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ValueError(f"{option} {shown}: {name} is a {kind}; wanted a callable with {arguments} arguments")
    _check_arguments(option, shown, found, arguments)
    return found


def absolute(text: str) -> str:
    """The same name from whatever folder it is used."""
    where, _, name = text.rpartition(":")
    return f"{Path(where).resolve()}:{name}" if where.endswith(".py") else text


def relative(text: str) -> str:
    """As it was written, most likely: by the way from here where that goes down only."""
    here = f"{Path.cwd()}/"
    return text.removeprefix(here)


def make_model(text: str, seed: int = 0) -> nn.Module:
    """In eval mode; weights that are drawn at random are those of `seed`, so that every verb sees the same."""
    make = find("--model", text)
    torch.manual_seed(seed)
    model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {relative(text)} returned a {type(model).__name__}; wanted a torch.nn.Module")
    return model.eval()


def make_batches(text: str, model: nn.Module, most: int | None = None, seed: int = 0) -> list[Any]:
    """What the callable returns, or yields, as a list of at most so many batches."""
    make = find("--data", text)
    torch.manual_seed(seed)
    found = make()
    if isinstance(found, (Tensor, tuple, Mapping)):
        found = [found]
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, nn.Module)):
        raise TypeError(
            f"--data {relative(text)} returned a {type(found).__name__}; wanted batches, or a data loader of them"
        )
    return batches_of(list(islice(found, most)), model)


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights of a safetensors file, or of a state_dict that torch.save wrote; nothing else is unpickled."""
    state = _state(path)
    if state and all(name.startswith("module.") for name in state):  # of a DataParallel model
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    wanted = model.state_dict()
    missing, extra = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    if missing:
        raise ValueError(f"--checkpoint {path} lacks {missing[0]!r}{_more(missing)}{_close(missing[0], list(state))}")
    if extra:
        raise ValueError(
            f"--checkpoint {path}: the model has no {extra[0]!r}{_more(extra)}{_close(extra[0], list(wanted))}"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            there, here = list(state[name].shape), list(tensor.shape)
            raise ValueError(f"--checkpoint {path}: {name!r} is {there}; the model's is {here}")
    model.load_state_dict(state)


def _state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with tensorfile.Reader(path) as file:
            return {name: file.tensor(name) for name in file.names}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickle, zipfile and torch have errors of their own
        reason = str(error).split(".")[0].splitlines()[0]
        raise ValueError(f"--checkpoint {path} holds no plain weights ({reason}); wanted a state_dict") from None
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"--checkpoint {path} holds a {type(found).__name__}; wanted names and tensors")
    return dict(found)


def _file(option: str, path: Path) -> ModuleType:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ValueError(f"{option}: there is no file {relative(str(path))!r}{_close(path.name, near)}")
    name = f"_mpqkern_{path.resolve().as_posix()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        folder = str(path.resolve().parent)  # as `python file.py` would find its neighbours
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, Exception):
                raise ValueError(f"{option}: {relative(str(path))} fails ({type(error).__name__}: {error})") from error
            raise
    return sys.modules[name]


def _module(option: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise ValueError(f"{option}: module {name!r} needs {error.name!r}, which is not installed") from error
        near = [p.name for p in Path.cwd().glob("*.py")]
        hint = _close(f"{name}.py", near)
        raise ValueError(f"{option}: there is no module {error.name!r}{hint or f'; wanted {FORM}'}") from None


def _check_arguments(option: str, text: str, make: Any, arguments: int) -> None:
    try:
        inspect.signature(make).bind(*[None] * arguments)
    except TypeError as error:
        wanted = f"a callable with {arguments} arguments" if arguments else "a callable without arguments"
        raise ValueError(f"{option} {text}: {error}; wanted {wanted}") from None
    except ValueError:  # written in C: nothing is known of its arguments
        return


def _close(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, found))}?" if found else ""


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
