"""Values of a TOML file against the annotations of the records that they fill: strictly, and in words."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}


class UnfitError(Exception):
    """A value that does not have the form; its text says what form that is."""


def hints(record: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass, names of its module resolved."""
    return get_type_hints(record)


def fitted(value: Any, form: Any) -> Any:
    """The value as the annotation wants it: lists become tuples, whole numbers floats where a float is wanted.

    Args:
        value: as TOML gives it.
        form: bool, int, float, str, Literal, tuple, a Mapping, or a union of these; None in a union only says that the
            key may be left out, which TOML does by leaving it out.

    Raises:
        UnfitError: it does not fit. A bool never passes for a number.
    """
    for option in _options(form):
        found = _fit(value, option)
        if found is not None:
            return found[0]
    raise UnfitError(words(form))


def words(form: Any) -> str:
    """The form as a person says it."""
    return " or ".join(_words(option) for option in _options(form))


def _options(form: Any) -> tuple[Any, ...]:
    if get_origin(form) in (Union, types.UnionType):
        return tuple(option for option in get_args(form) if option is not type(None))
    return (form,)


def _fit(value: Any, form: Any) -> tuple[Any] | None:
    """The fitted value in a tuple of one, or None."""
    origin, inside = get_origin(form), get_args(form)
    if origin is Literal:
        return (value,) if any(type(value) is type(known) and value == known for known in inside) else None
    if origin is tuple:
        return _fit_tuple(value, inside)
    if origin is not None and issubclass(origin, Mapping):
        return (dict(value),) if isinstance(value, dict) else None
    if form is float and type(value) is int:
        return (float(value),)
    return (value,) if type(value) is form else None


def _fit_tuple(value: Any, inside: tuple[Any, ...]) -> tuple[Any] | None:
    if not isinstance(value, list):
        return None
    if len(inside) == 2 and inside[1] is Ellipsis:
        inside = (inside[0],) * len(value)
    if len(inside) != len(value):
        return None
    try:
        return (tuple(fitted(each, form) for each, form in zip(value, inside, strict=True)),)
    except UnfitError:
        return None


def _words(form: Any) -> str:
    origin, inside = get_origin(form), get_args(form)
    if origin is Literal:
        return "one of " + ", ".join(repr(known) for known in inside)
    if origin is tuple:
        if len(inside) == 2 and inside[1] is Ellipsis:
            return f"a list, each {words(inside[0])}"
        return f"a list of {len(inside)}: {', '.join(words(each) for each in inside)}"
    if origin is not None and issubclass(origin, Mapping):
        return "a table"
    return _PLAIN.get(form, str(form))
