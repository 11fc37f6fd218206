"""What DynFuse needs of a WebUI, declared as data and looked up before anything is touched.

    Value("modules.paths_internal", "models_path")                    is there
    Call("networks", "list_available_networks")                       is there, and takes what we pass
    Seam("networks", "load_networks", ("names", "te_multipliers"))    is there, and is called with what we read

By capability, never by a version string: forks carry the strings of what they were forked from.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_SHOWN = 3  # of the things that are missing, in one sentence


@dataclass(frozen=True)
class Value:
    """A value of a module. path: with dots for an attribute of a class or of an object."""

    module: str
    path: str

    @property
    def name(self) -> str:
        """module and path, for people."""
        return f"{self.module}.{self.path}"

    def problem(self) -> str | None:
        """A clause that says what is wrong, None if nothing is."""
        try:
            owner, attribute = self.place()
        except ImportError:
            return f"the module {self.module} is missing"
        except AttributeError:
            return f"{self.name} is missing"
        except Exception as reason:
            return f"the module {self.module} cannot be loaded ({type(reason).__name__})"
        return None if _has(owner, attribute) else f"{self.name} is missing"

    def place(self) -> tuple[Any, str]:
        """The object that holds the value, and the attribute's name. Raises ImportError or AttributeError."""
        owner: Any = importlib.import_module(self.module)
        *parents, attribute = self.path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute


@dataclass(frozen=True)
class Call(Value):
    """A function that we call. positions: number of arguments by position, a method's self among them. keywords: names of the others."""

    positions: int = 0
    keywords: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """See Value."""
        return super().problem() or self._refusal()

    def _refusal(self) -> str | None:
        signature = _signature(*self.place())
        if signature is None:
            return f"{self.name} is no function"
        if signature is _UNKNOWN:
            return None
        try:
            signature.bind(*[None] * self.positions, **dict.fromkeys(self.keywords))
        except TypeError as reason:
            return f"{self.name} takes other arguments ({reason})"
        return None


@dataclass(frozen=True)
class Seam(Value):
    """A function that we wrap: a module's, or a class's own. parameters: the first ones, which we read; any others may follow."""

    parameters: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """See Value."""
        return super().problem() or self._difference()

    def _difference(self) -> str | None:
        owner, attribute = self.place()
        if attribute not in vars(owner):
            return f"{self.name} is missing"
        signature = _signature(owner, attribute)
        if signature is None:
            return f"{self.name} is no function"
        if signature is _UNKNOWN:
            return None
        found = list(signature.parameters.values())
        for position, wanted in enumerate(self.parameters):
            if position < len(found) and found[position].kind is inspect.Parameter.VAR_POSITIONAL:
                return None  # another extension's wrapper, which takes whatever comes
            if (
                position >= len(found)
                or found[position].name != wanted
                or found[position].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            ):
                return f"{self.name} takes other arguments (no {wanted!r} in place {position + 1})"
        return None


def held(module: str, name: str) -> Any:
    """What a module of the WebUI holds under a name; None where there is no such module or name."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def why_off(needs: Iterable[Value], barred: Iterable[str] = ()) -> str | None:
    """One sentence on what a WebUI lacks, None if it lacks nothing. barred: modules that stand for another way of doing things."""
    problems = [f"it runs its models by way of {module}, which DynFuse does not know" for module in barred if _importable(module)]
    problems += [problem for need in needs if (problem := need.problem()) is not None]
    if not problems:
        return None
    rest = f" and {len(problems) - _SHOWN} things more" if len(problems) > _SHOWN else ""
    return off_because("; ".join(dict.fromkeys(problems[:_SHOWN])) + rest)


def off_because(reason: str) -> str:
    """The sentence for the console and the panel. reason: a clause."""
    return f"DynFuse is off in this WebUI, which works as if it were not installed: {reason}."


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _has(owner: Any, attribute: str) -> bool:
    """Without asking for the value: A1111 loads a checkpoint when modules.shared.sd_model is read (shared_items.py:172)."""
    if attribute in getattr(owner, "__dataclass_fields__", ()):
        return True
    try:
        inspect.getattr_static(owner, attribute)
    except AttributeError:
        return False
    return True


class _Unknown(inspect.Signature):
    """Of a callable that Python cannot look into."""


_UNKNOWN = _Unknown()


def _signature(owner: Any, attribute: str) -> inspect.Signature | None:
    """None: cannot be called. As seen from the owner: a function of a class has its self."""
    function = getattr(owner, attribute)
    if not callable(function):
        return None
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return _UNKNOWN


__all__ = ["Call", "Seam", "Value", "held", "off_because", "why_off"]
