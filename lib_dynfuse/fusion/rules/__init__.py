"""The fusion methods, one file and one formula each. A file that is put beside these is a method of its own.

Every module here that holds a subclass of Rule with a name is found and registered with the settings, from where the panel, the tag, the
API and the command line have it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from ...settings import register_method
from .rule import Member, Places, Rule, Votes

RULES: dict[str, type[Rule]] = {}
"""The methods by the value of the setting `method`."""


# Where methods are listed: the recommended one, the paper's, the plain sum; then the others by name.
_FIRST = ("balanced", "dynfuse", "direct")


def discover() -> None:
    """Register the rules of all modules here. Raises ValueError for two of one name."""
    found: list[type[Rule]] = []
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        classes = (thing for _, thing in inspect.getmembers(module, inspect.isclass) if thing.__module__ == module.__name__)
        found += [thing for thing in classes if issubclass(thing, Rule) and not inspect.isabstract(thing)]
    for rule in sorted(found, key=lambda rule: (_FIRST.index(rule.name) if rule.name in _FIRST else len(_FIRST), rule.name)):
        if RULES.setdefault(rule.name, rule) is not rule:
            raise ValueError(f"two rules are named {rule.name!r}")
        register_method(rule.name, rule.summary)


discover()

__all__ = ["RULES", "Member", "Places", "Rule", "Votes", "discover"]
