"""Plug-ins by name or path: `name` is `<package>/name.py:name`, else `pkg.module:object` or `path/to/file.py:object`.

Their parameters are compared with the signature before anything is loaded, so a misspelt one costs no GPU time.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpost.errors import RecipeError, RunError

USER_CODE_ERRORS = (
    ImportError,
    SyntaxError,
    NameError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
)
"""What a user's file may raise that becomes one message; anything rarer keeps its stack."""

OF_REWARDS = frozenset({"use", "weight", "on_error", "timeout_s", "isolate"})
"""Keys of a reward that the run reads itself: no parameter can have such a name."""
_SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def make_importable(folder: str | Path) -> None:
    """Let plug-ins in `folder` be imported; installed packages of the same name come first."""
    path = str(Path(folder).resolve())
    if path not in sys.path:
        sys.path.append(path)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known word, as the end of a sentence; empty where nothing is near.

    >>> did_you_mean("tempreature", ["temperature", "top_p"])
    ', did you mean `temperature`?'
    """
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean `{near[0]}`?" if near else ""


def user_error(error: BaseException) -> str:
    """One line for an error in a user's file: its type, its text, and the file and line it came from."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
        and "site-packages" not in frame.filename
        and Path(frame.filename) not in (Path(__file__), Path(importlib.__file__))
    ]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def resolve(spec: str, package: str) -> Callable[..., Any]:
    """The function or class that `spec` names; `package` is where bare names are looked up."""
    module_name, colon, object_name = spec.rpartition(":")
    if not colon:
        return _resolve_bare(spec, package)
    module = load_file(module_name) if module_name.endswith(".py") else _load_module(module_name, spec)
    return _object_of(module, (object_name,), spec)


def bind(
    plugin: Mapping[str, Any], package: str, *, where: str, skip: int, supplied: Collection[str] = ()
) -> functools.partial[Any]:
    """The plug-in with its recipe parameters filled in.

    The caller still gives the first `skip` positional arguments and the keywords in `supplied`. `where` is the
    plug-in's recipe key.
    """
    use = plugin.get("use")
    if not isinstance(use, str) or not use:
        raise RecipeError([f"{where}.use must name a plug-in in {package}/ or be `pkg.module:object` (got {use!r})"])
    reserved = OF_REWARDS if package == "rewards" else {"use"}
    kwargs = {name: value for name, value in plugin.items() if name not in reserved}
    try:
        function = resolve(use, package)
    except RunError as error:
        raise RecipeError([f"{where}.use: {error}"]) from None
    problems = argument_problems(function, kwargs, where=where, use=use, skip=skip, supplied=supplied)
    if problems:
        raise RecipeError(problems)
    return functools.partial(function, **kwargs)


def argument_problems(
    function: Callable[..., Any],
    kwargs: Mapping[str, Any],
    *,
    where: str,
    use: str,
    skip: int = 0,
    supplied: Collection[str] = (),
) -> list[str]:
    """Every way in which `kwargs` do not fit the signature, each naming the recipe key."""
    parameters = list(inspect.signature(function).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    problems = []
    if len(positional) < skip and inspect.Parameter.VAR_POSITIONAL not in kinds:
        problems.append(f"{where}: `{use}` must take {skip} positional argument{'s' * (skip != 1)}")
    filled = {parameter.name for parameter in positional[:skip]}
    named = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and parameter.name not in filled
    }
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    problems += [f"{where}: `{use}` must take the keyword `{x}`" for x in supplied if x not in named and not takes_any]
    free = [name for name in named if name not in supplied]
    for name, value in kwargs.items():
        if name in free:
            problems += _type_problem(named[name], value, f"{where}.{name}")
        elif name in filled or name in supplied:
            problems.append(f"{where}.{name} is given by the run and cannot be set in a recipe")
        elif not takes_any:
            takes = ", ".join(free) or "no parameters"
            problems.append(
                f"{where}.{name}: `{use}` has no such parameter{did_you_mean(name, free)} (it takes {takes})"
            )
    for name in free:
        if named[name].default is inspect.Parameter.empty and name not in kwargs:
            problems.append(f"{where}.{name} must be given: `{use}` has no default for it")
    return problems


def _type_problem(parameter: inspect.Parameter, value: Any, where: str) -> list[str]:
    """Compares with plain annotations only (`int`, `float | None`); anything richer is left to the plug-in."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    names = [name.strip() for name in text.split("|")]
    if any(name not in _SIMPLE_TYPES for name in names):
        return []
    fits = any(
        isinstance(value, _SIMPLE_TYPES[name]) and (name == "bool" or not isinstance(value, bool)) for name in names
    )
    return [] if fits else [f"{where} must be {text} (got {value!r})"]


def _resolve_bare(name: str, package: str) -> Callable[..., Any]:
    """`<package>/name.py:name`, or its `Name` for a class."""
    folder = importlib.import_module(package)
    available = sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))
    if name not in available:
        if "." in name or "/" in name:
            raise RunError(f"`{name}` must name its object after a colon, as in `pkg.module:object`")
        raise RunError(f"{package}/ has no `{name}`{did_you_mean(name, available)} (it has {', '.join(available)})")
    module = _load_module(f"{package}.{name}", name)
    return _object_of(module, (name, "".join(part.capitalize() for part in name.split("_"))), name)


def _load_module(module_name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except USER_CODE_ERRORS as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent and (module_name == absent or module_name.startswith(f"{absent}.")):
            raise RunError(
                f"no module `{absent}` for `{spec}`: it must be in the current folder, beside the recipe, or installed"
            ) from None
        raise RunError(f"`{spec}` cannot be imported: {user_error(error)}") from error


def load_file(file: str) -> ModuleType:
    """The module that a Python file is, loaded once."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise RunError(f"the file {file} does not exist (relative paths start at the current folder)")
    name = f"{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RunError(f"the file {file} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except USER_CODE_ERRORS as error:
        del sys.modules[name]
        raise RunError(f"`{file}` cannot be imported: {user_error(error)}") from error
    return module


def _object_of(module: ModuleType, names: tuple[str, ...], spec: str) -> Callable[..., Any]:
    for name in names:
        if callable(found := getattr(module, name, None)):
            return found
    has = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    listing = ", ".join(has) or "no functions or classes"
    raise RunError(
        f"`{spec}`: {module.__file__} has no function or class `{' or '.join(names)}`"
        f"{did_you_mean(names[0], has)} (it has {listing})"
    )
