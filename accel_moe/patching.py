"""Functions of other packages, replaced on a leash.

A patch stands beside the code that it calls:

    @patch("accelerate.Accelerator.end_training", why="It destroys the process group that ...", tested=ACCELERATE)
    def end_training(original, self):
        wait_for_background()
        return original(self)

The first parameter is the function that is replaced, the others are its own. `install` compares their names with those
of the installed version before it replaces anything, and refuses loudly if they moved. `uninstall` puts everything
back. hooks.py says which patches there are, and when they are in place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from accel_moe import supported

Function = TypeVar("Function", bound=Callable[..., Any])

ACCELERATE = supported.words("accelerate")
TRANSFORMERS = supported.words("transformers")
TRAINER = supported.words("transformers", "accelerate")


@dataclass(frozen=True)
class Patch:
    """One function in the place of another.

    Attributes:
        target: dotted path; the last part is the attribute that is replaced.
        function: takes the replaced function, then its arguments.
        why: why there is no hook or public API to use instead, for the reader and for the error.
        tested: the versions it was run with (supported.py).
    """

    target: str
    function: Callable[..., Any]
    why: str
    tested: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """The target's own, in order, in the tested versions."""
        return tuple(inspect.signature(self.function).parameters)[1:]


_originals: dict[str, Any] = {}


def patch(*targets: str, why: str, tested: str) -> Callable[[Function], Function]:
    """Decorates, as the outermost decorator, a function that is to run in the place of each of `targets`."""

    def decorate(function: Function) -> Function:
        vars(function)["_patches"] = tuple(Patch(target, function, why, tested) for target in targets)
        return function

    return decorate


def patches_of(*owners: ModuleType | FunctionType) -> tuple[Patch, ...]:
    """The patches of these functions, and of all functions that these modules define, in the order of the files."""
    functions: list[Any] = []
    for owner in owners:
        inside = vars(owner).values() if isinstance(owner, ModuleType) else [owner]
        functions += [
            f
            for f in inside
            if isinstance(f, FunctionType) and f.__module__ == getattr(owner, "__module__", owner.__name__)
        ]
    return tuple(one for function in functions for one in vars(function).get("_patches", ()))


def install(patches: Iterable[Patch]) -> None:
    """Put patches in place; those that are in place already are left alone.

    Raises:
        RuntimeError: a target is gone or takes other parameters than it did in the tested versions. None of `patches`
            is put in place then.
    """
    new = [one for one in patches if not is_installed(one)]
    for one in new:
        if (why := off_leash(one)) is not None:
            raise RuntimeError(why)
    for one in new:
        owner, name = _locate(one.target)
        _originals[one.target] = inspect.getattr_static(owner, name)  # a static method must come back as one
        replacement: Any = _bound(one.function, getattr(owner, name))
        is_static = isinstance(_originals[one.target], staticmethod)
        setattr(owner, name, staticmethod(replacement) if is_static else replacement)


def install_fitting(patches: Iterable[Patch]) -> None:
    """Put in place those of `patches` that fit what is installed here: for targets that other versions do not need, or
    may lack."""
    install(one for one in patches if off_leash(one) is None)


def uninstall(patches: Iterable[Patch]) -> None:
    """Undo those of `patches` that are in place, newest first."""
    targets = {one.target for one in patches}
    for target in [target for target in reversed(_originals) if target in targets]:
        owner, name = _locate(target)
        setattr(owner, name, _originals.pop(target))


def is_installed(one: Patch) -> bool:
    return one.target in _originals


def off_leash(one: Patch) -> str | None:
    """Why the patch does not fit what is installed here, or None. One that is in place is seen through."""
    try:
        owner, name = _locate(one.target)
        found = _parameters_of(getattr(owner, name))
    except LookupError:
        moved = "which this version does not have"
    except TypeError:
        moved = "which is no function here"
    else:
        if found == one.parameters:
            return None
        moved = f"and found it with parameters {found} where it expected {one.parameters}"
    package = one.target.split(".")[0]
    return (
        f"accel_moe patches {one.target}, {moved} ({package} {supported.installed(package)}; tested with "
        f"{one.tested}). Install a tested version, or update accel_moe. What the patch is for: {one.why}"
    )


def _bound(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its first argument; a function again, so that it binds as a method."""

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        return function(original, *args, **kwargs)

    return replacement


def _parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters; of one written in C++, the names that pybind's docstring begins with."""
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:
        listed = re.match(r"\w+\((.*?)\)", function.__doc__ or "")
        return tuple(part.partition(":")[0].strip() for part in listed[1].split(",")) if listed else ()


def _locate(target: str) -> tuple[Any, str]:
    """The object that holds the attribute, and its name: modules first, then attributes of the module.

    Raises LookupError if there is none.
    """
    *path, name = target.split(".")
    for cut in range(len(path), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(path[:cut]))
        except ModuleNotFoundError:
            continue
        for part in path[cut:]:
            owner = getattr(owner, part, None)
        if hasattr(owner, name):
            return owner, name
        break
    raise LookupError(target)
