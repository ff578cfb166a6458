"""Reads Google-style docstrings and compares them with the code they document."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import inspect
import itertools
import pkgutil
import re
import sys
import textwrap

HEADINGS = (
    *("Args", "Keyword Args", "Returns", "Yields", "Raises", "Warns", "Attributes"),
    *("Example", "Examples"),
)
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
STARS = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


def sections(docstring):
    """The text under each heading of a docstring, and under "" what is above them."""
    found, heading = {"": ""}, ""
    for line in inspect.cleandoc(docstring).splitlines():
        if line.endswith(":") and line[:-1] in HEADINGS:
            heading = line[:-1]
            found[heading] = ""
        else:
            found[heading] += line + "\n"
    return found


def entries(section):
    """The entries ``name (type): text`` of a section, in their order."""
    found, name = {}, None
    for line in textwrap.dedent(section).splitlines():
        if line and not line[0].isspace():
            match = re.match(r"([\w.*]+)(?: \(.*?\))?:(?: (.*))?$", line)
            name = match[1] if match else line
            found[name] = (match[2] or "") if match else ""
        elif name is not None:
            found[name] += f" {line.strip()}"
    return found


def parameters(documented):
    """What a function, or the constructor of a class of this package, takes."""
    if inspect.isclass(documented):
        owner = next(one for one in documented.__mro__ if "__init__" in vars(one))
        if not owner.__module__.startswith("alm_torchrl"):
            return []
        documented = vars(owner)["__init__"]
    taken = inspect.signature(documented).parameters.values()
    return [one for one in taken if one.name not in ("self", "cls")]


def problems(documented, *, complete=False):
    """What the docstring of a function or class gets wrong, as a list of sentences.

    A dataclass may describe its fields below each of them instead of as arguments.
    With ``complete``, arguments must be documented; otherwise only if others are.
    """
    if not documented.__doc__:
        return ["has no docstring"]
    parts = sections(documented.__doc__)
    namespace = vars(sys.modules[documented.__module__])
    attributes = "Attributes" if "Attributes" in parts else "Args"
    if dataclasses.is_dataclass(documented) and attributes not in parts:
        found = _undocumented_fields(documented)
    elif complete or {"Args", "Keyword Args"} & set(parts):
        found = _argument_problems(documented, attributes, parts, namespace)
    else:
        found = []
    for heading, base in (("Raises", BaseException), ("Warns", Warning)):
        for name in entries(parts.get(heading, "")):
            raised = _exception(name, namespace)
            if not (inspect.isclass(raised) and issubclass(raised, base)):
                found.append(f"{heading}: {name} is no {base.__name__}")
    return found


def _undocumented_fields(documented):
    body = ast.parse(textwrap.dedent(inspect.getsource(documented))).body[0].body
    described = {
        one.target.id
        for one, following in itertools.pairwise(body)
        if isinstance(one, ast.AnnAssign) and _is_text(following)
    }
    own = inspect.get_annotations(documented)
    return [
        f"{field.name}: the field has no docstring"
        for field in dataclasses.fields(documented)
        if field.name in own and field.name not in described
    ]


def _is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _argument_problems(documented, attributes, parts, namespace):
    found = []
    expected = {attributes: {}, "Keyword Args": {}}
    for one in parameters(documented):
        kind = "Keyword Args" if one.kind is KEYWORD_ONLY else attributes
        expected[kind][STARS.get(one.kind, "") + one.name] = one
    # Keyword arguments that are passed on stand last, under either heading.
    passed_on = {name for name in expected[attributes] if name.startswith("**")}
    described = {key: entries(parts.get(key, "")) for key in expected}
    for name in sorted(passed_on):
        if sum(list(one)[-1:] == [name] for one in described.values()) != 1:
            found.append(f"{name}: expected once, as the last argument")
    for key, taken in expected.items():
        names = [name for name in described[key] if name not in passed_on]
        wanted = [name for name in taken if name not in passed_on]
        if names != wanted:
            found.append(f"{key}: {names} are documented, but it takes {wanted}")
            continue
        for name in wanted:
            text = described[key][name]
            found += _default_problems(name, taken[name].default, text, namespace)
    return found


def _default_problems(name, default, text, namespace):
    stated = re.findall(r"Default: ``(.+?)``", text)
    if default is inspect.Parameter.empty:
        return [f"{name}: has no default, got {stated[0]}"] if stated else []
    if len(stated) != 1:
        return [f"{name}: its default should be stated once, got {stated}"]
    try:
        value = eval(stated[0], {**vars(builtins), **namespace})
    except (NameError, SyntaxError, AttributeError):
        return [f"{name}: its default {stated[0]} means nothing in the module"]
    equal = type(value) is type(default) and value == default
    return [] if equal else [f"{name}: its default is {default!r}, got {stated[0]}"]


def _exception(name, namespace):
    """An exception of the module, of Python, of the package, or with its full path."""
    if "." in name:
        try:
            return pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return None
    own = [vars(m) for n, m in sys.modules.items() if n.startswith("alm_torchrl")]
    spaces = (namespace, vars(builtins), *own)
    return next((space[name] for space in spaces if name in space), None)


def has_example(module, name):
    """Whether the docstring of a name has code that pytest runs in its module."""
    tests = doctest.DocTestFinder(recurse=False).find(
        getattr(module, name),
        name,
        module=sys.modules[getattr(module, name).__module__],
    )
    examples = [example for test in tests for example in test.examples]
    skipped = any(doctest.SKIP in example.options for example in examples)
    return bool(examples) and not skipped


def members(module):
    """The functions and classes that a module offers, and their public methods.

    Methods that override those of another package are documented there.
    """
    found = {}
    for name in module.__all__:
        member = getattr(module, name)
        if not (inspect.isclass(member) or inspect.isroutine(member)):
            continue
        found[name] = member
        for key, attribute in vars(member).items() if inspect.isclass(member) else ():
            attribute = getattr(attribute, "fget", None) or attribute
            attribute = getattr(attribute, "__func__", attribute)
            if not inspect.isfunction(attribute) or key.startswith("_"):
                continue
            if not any(key in vars(base) for base in _foreign(member)):
                found[f"{name}.{key}"] = inspect.unwrap(attribute)
    return found


def _foreign(kind):
    return [c for c in kind.__mro__ if not c.__module__.startswith("alm_torchrl")]


def undocumented_data(module):
    """Constants of ``__all__`` assigned in a module without a docstring below."""
    body = ast.parse(inspect.getsource(module)).body
    bare = set()
    for one, following in itertools.pairwise([*body, None]):
        targets = getattr(one, "targets", [getattr(one, "target", None)])
        if isinstance(one, ast.Assign | ast.AnnAssign) and not _is_text(following):
            bare |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(name for name in bare & set(module.__all__) if name.isupper())
