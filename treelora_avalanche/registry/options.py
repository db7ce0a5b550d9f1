"""Options of methods and scenarios, read from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import docstring_parser
import jsonargparse

from treelora_avalanche.choices import check_known


@dataclass(frozen=True)
class Option:
    """One option of a method or scenario.

    >>> METHODS["EWCLoRA"].own_options()["ewc_lambda"].default

    :param name: name of the parameter.
    :param default: default value; ``inspect.Parameter.empty`` if there is none.
    :param annotation: type of the parameter.
    :param doc: first sentence of its documentation.
    """

    name: str
    default: Any
    annotation: Any
    doc: str


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class or function by name, without ``*args`` and ``**kwargs``.

    :param function: a class or function.
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind not in variable}


def own_options(function: Callable[..., Any], supplied: Collection[str]) -> dict[str, Option]:
    """Returns the options of a strategy or a benchmark generator.

    :param function: a class or function whose docstring has ``:param name:`` fields.
    :param supplied: parameters that the caller supplies, which are no options.
    """
    docs = _documentation(function)
    hints = _hints(function)
    return {
        name: Option(name, parameter.default, hints.get(name, Any), docs.get(name, ""))
        for name, parameter in parameters_of(function).items()
        if name not in supplied
    }


def _documentation(function: Callable[..., Any]) -> dict[str, str]:
    classes = function.__mro__ if inspect.isclass(function) else (function,)
    docs: dict[str, str] = {}
    # Avalanche documents the parameters of a class in the docstring of __init__.
    texts = [text for c in classes for text in (c.__doc__, getattr(c.__init__, "__doc__", None))]
    for text in texts:
        for parameter in docstring_parser.parse(text or "").params:
            docs.setdefault(parameter.arg_name, _first_sentence(parameter.description or ""))
    return docs


def _first_sentence(text: str) -> str:
    """Returns the first sentence without reStructuredText markup and references."""
    sentence = " ".join(text.split()).split(". ")[0]
    sentence = re.sub(r":\w+:`~?(?:[\w. ]*\.)?(\w+)`", r"\1", sentence).replace("``", "")
    return re.sub(r"[;:,]? see \w+$", "", sentence.rstrip(".;:"))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except NameError:  # a name is imported for type checkers alone
        return {}
    empty = inspect.Parameter.empty
    return {n: p.annotation for n, p in parameters.items() if p.annotation is not empty}


def check_options(
    what: str, given: Mapping[str, Any], options: Mapping[str, Option]
) -> dict[str, Any]:
    """Returns the values of options, converted to their types as flags are.

    :param what: name of the method or scenario, for errors.
    :param given: values by name.
    :param options: the known options.
    :raises ValueError: if a name is unknown, or a value does not have the option's type.
    """
    for name, value in given.items():
        check_known(f"option of {what}", name, options)
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        annotation = options[name].annotation
        may_be_none = annotation is Any or type(None) in get_args(annotation)
        parser.add_argument(f"--{name}", type=annotation, required=not may_be_none)
        try:
            given = {**given, name: parser.parse_object({name: value}, defaults=False)[name]}
        except jsonargparse.ArgumentError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"`{name}` of {what} should be of type {_type_name(annotation)}, but is "
                f"{value!r} ({reason.rstrip('.')})."
            ) from error
    return dict(given)


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation)


def show_default(option: Option) -> str:
    """Returns the default of an option as text.

    :param option: the option.
    """
    return "required" if option.default is inspect.Parameter.empty else repr(option.default)
