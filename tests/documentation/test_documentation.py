"""What the docstrings say agrees with the code, and each public name has an example."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import types
import typing

import pytest

import alm_torchrl
from tests.documentation import docstrings

MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(alm_torchrl.__path__, "alm_torchrl.")
]
# What users import; the other modules serve the command line and these.
PUBLIC = [
    alm_torchrl,
    *(
        importlib.import_module(f"alm_torchrl.{name}")
        for name in (
            *("functional", "distributions", "networks", "networks.layers"),
            *("objectives", "replay", "envs", "evaluation"),
            *("training.stepper", "training.checkpoint", "training.hooks"),
            *("training.trainer", "baselines", "testing", "bounds", "analysis"),
            *("experiments.catalogue", "runs.loading"),
        )
    ),
]
# Their module says once what all of their functions take.
TAKE_THE_SAME = [importlib.import_module("alm_torchrl.testing")]


def found_in(modules, **options):
    return {
        f"{member.__module__}.{name}": problems
        for module in modules
        for name, member in docstrings.members(module).items()
        if (problems := docstrings.problems(member, **options))
    }


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_each_public_name_is_documented_with_an_example(module):
    assert not found_in([module], complete=module not in TAKE_THE_SAME)
    names = [name for name in docstrings.members(module) if "." not in name]
    assert names
    assert not [name for name in names if not docstrings.has_example(module, name)]


def test_the_other_docstrings_say_what_the_code_takes_and_raises():
    modules = [module for module in MODULES if hasattr(module, "__all__")]
    assert len(modules) > 50
    assert not found_in(modules)


def test_each_public_table_has_a_docstring():
    assert not {
        module.__name__: bare
        for module in MODULES
        if hasattr(module, "__all__") and (bare := docstrings.undocumented_data(module))
    }


def test_the_examples_are_run(pytestconfig):
    assert pytestconfig.getoption("doctestmodules")
    assert "alm_torchrl" in pytestconfig.getini("testpaths")


def test_all_names_are_there_once():
    for module in PUBLIC:
        assert len(module.__all__) == len(set(module.__all__))
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


# -- the checker sees what is wrong ----------------------------------------------------


def good(first: int, second: float = 2.0, *, third: str | None = None) -> None:
    """Does nothing.

    Args:
        first: a number.
        second (float): another, with a long text that
            goes on. Default: ``2.0``, which is two.

    Keyword Args:
        third (str, optional): a text. Default: ``None``.

    Raises:
        ValueError: never.
        KeyError: never.

    Examples:
        >>> good(1)
    """


def changed(old: str, new: str) -> typing.Callable[..., None]:
    text = inspect.getdoc(good)
    assert text.count(old) == 1
    copy = types.FunctionType(good.__code__, globals(), "good", good.__defaults__)
    copy.__kwdefaults__ = good.__kwdefaults__
    copy.__annotations__ = good.__annotations__
    copy.__doc__ = text.replace(old, new)
    return copy


def test_a_right_docstring_passes():
    assert docstrings.problems(good, complete=True) == []
    assert docstrings.has_example(sys.modules[__name__], "good")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("second (float): ", "other (float): ", "Args: ['first', 'other'] are docu"),
        ("third (str, optional)", "**third", "Keyword Args: ['**third'] are docume"),
        ("    first: a number.\n", "", "Args: ['second'] are documented, but it takes"),
        ("\n\nKeyword Args:\n", "\n", "Args: ['first', 'second', 'third'] are doc"),
        ("``2.0``", "``3.0``", "second: its default is 2.0, got 3.0"),
        ("``2.0``", "``2``", "second: its default is 2.0, got 2"),
        ("``2.0``", "``two``", "second: its default two means nothing"),
        (" Default: ``None``.", "", "third: its default should be stated once"),
        ("a number.", "a number. Default: ``1``.", "first: has no default, got 1"),
        ("KeyError:", "KeyErorr:", "Raises: KeyErorr is no BaseException"),
        ("KeyError:", "dict:", "Raises: dict is no BaseException"),
        ("KeyError:", "torch.NoError:", "Raises: torch.NoError is no BaseException"),
        ("Raises:", "Warns:", "Warns: ValueError is no Warning"),
    ],
)
def test_a_wrong_docstring_is_seen(old, new, problem):
    assert any(
        found.startswith(problem) for found in docstrings.problems(changed(old, new))
    )


def test_missing_docstrings_and_examples_are_seen(monkeypatch):
    module = sys.modules[__name__]
    silent = changed("Does nothing.", "Does nothing.")
    silent.__doc__ = None
    assert docstrings.problems(silent) == ["has no docstring"]
    silent.__doc__ = "Does nothing."
    assert docstrings.problems(silent) == []
    assert len(docstrings.problems(silent, complete=True)) == 2
    for new in ("", ">>> good(1)  # doctest: +SKIP"):
        monkeypatch.setattr(module, "shown", changed(">>> good(1)", new), raising=False)
        assert not docstrings.has_example(module, "shown")
