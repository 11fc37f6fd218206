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


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule a method. Raises ValueError for a name that another has."""
    if RULES.get(rule.name, rule) is not rule:
        raise ValueError(f"two rules are named {rule.name!r}")
    RULES[rule.name] = rule
    register_method(rule.name, rule.summary)
    return rule


def _found() -> list[type[Rule]]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    classes = [
        thing for module in modules for _, thing in inspect.getmembers(module, inspect.isclass) if thing.__module__ == module.__name__
    ]
    return [thing for thing in classes if issubclass(thing, Rule) and not inspect.isabstract(thing)]


for _rule in sorted(_found(), key=lambda rule: (rule.name != "dynfuse", rule.name)):
    register(_rule)


__all__ = ["RULES", "Member", "Places", "Rule", "Votes", "register"]
