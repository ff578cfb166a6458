"""The defaults that docstrings state are those of the signatures."""

from __future__ import annotations

import builtins
import importlib
import inspect
import pkgutil
import re
import sys

import alm_torchrl

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(alm_torchrl.__path__, "alm_torchrl.")
]
ENTRY = re.compile(r"^ {4}([\w*]+(?:, [\w*]+)*)(?: \([^)]*\))?: ", re.M)


def documented(module):
    """The functions, classes and methods that are defined in a module, by name."""
    for name, member in vars(module).items():
        if getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(member):
            yield name, member, member
        elif inspect.isclass(member):
            if "__init__" in vars(member):
                yield name, member, member.__init__
            for key, method in vars(member).items():
                if inspect.isfunction(method) and not key.startswith("_"):
                    yield f"{name}.{key}", method, method


def wrong_defaults(member, function):
    """What a docstring says of arguments and does not hold, as sentences."""
    text = inspect.getdoc(member) or ""
    arguments = text.partition("Args:\n")[2]
    parts = ENTRY.split(
        re.split(r"^(?:Returns|Yields|Raises|Warns|Example)", arguments, flags=re.M)[0]
    )
    taken = inspect.signature(function).parameters
    space = {**vars(builtins), **vars(sys.modules[function.__module__])}
    entries = zip(parts[1::2], parts[2::2], strict=True)
    for name, said in ((n, said) for names, said in entries for n in names.split(", ")):
        name = name.lstrip("*")
        if name not in taken:
            yield f"{name} is no argument"
            continue
        default = taken[name].default
        stated = re.findall(r"Default:\s+``(.+?)``", said)
        if default is inspect.Parameter.empty:
            if stated:
                yield f"{name} has no default, got {stated[0]}"
        elif not stated and default in (None, ()):
            continue  # of nothing, the text may say what it stands for
        elif len(stated) != 1:
            yield f"{name}: expected its default {default!r} once, got {stated}"
        else:
            value = eval(stated[0], space)
            if type(value) is not type(default) or value != default:
                yield f"{name}: expected its default {default!r}, got {stated[0]}"


def test_stated_defaults_are_those_of_the_signatures():
    found, checked = {}, 0
    for module in MODULES:
        for name, member, function in documented(module):
            function = inspect.unwrap(function)
            if not function.__module__.startswith("alm_torchrl"):
                continue
            checked += 1
            if wrong := list(wrong_defaults(member, function)):
                found[f"{module.__name__}.{name}"] = wrong
    assert found == {}
    assert checked > 300


def test_public_names_are_there_once():
    for module in (alm_torchrl, *MODULES):
        names = getattr(module, "__all__", [])
        assert len(names) == len(set(names))
        assert [name for name in names if not hasattr(module, name)] == []
