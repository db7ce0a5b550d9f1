"""Names in YAML as they are written: ``001`` is a folder, not the number 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import jsonargparse
import yaml

from treelora_avalanche.registry.settings import RunSettings

YAML_MODE = "treelora"
"""Parser mode of jsonargparse in which YAML is read with :func:`quote_names`."""

LISTS_OF_NAMES = frozenset(
    {f.name for f in fields(RunSettings) if f.type == "list[str] | None"}
    | {"fixed_class_order", "task_classes"}
)
"""Settings and options of scenarios that hold names."""
TEXTS = frozenset(f.name for f in fields(RunSettings) if f.type in ("str", "str | None"))
_STRING, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


def quote_names(text: str, key: str | None = None) -> str:
    """Returns YAML in which names are strings as written, all else the same.

    >>> quote_names("{tasks: [001, on], order: 1}")
    "{tasks: ['001', 'on'], order: 1}\\n"

    :param text: the YAML; returned as it is if it cannot be read.
    :param key: the key of which ``text`` is the value; None if the keys are in ``text``.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return text  # the parser reports it
    changed = _quote_below(root) if key in LISTS_OF_NAMES else _quote(root)
    return str(yaml.serialize(root)) if changed else text


def _quote(node: yaml.Node | None) -> bool:
    """Makes the names below a node strings; returns whether there are unquoted ones."""
    changed = False
    for child in node.value if isinstance(node, yaml.SequenceNode) else ():
        changed |= _quote(child)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value in LISTS_OF_NAMES and not isinstance(value, yaml.ScalarNode):
            changed |= _quote_below(value)
        elif key.value in LISTS_OF_NAMES | TEXTS and isinstance(value, yaml.ScalarNode):
            changed |= value.tag != _NULL and _quote_below(value)
        else:
            changed |= _quote(value)
    return changed


def _quote_below(node: yaml.Node | None) -> bool:
    plain = [scalar for scalar in _scalars(node) if scalar.style is None]
    for scalar in plain:
        scalar.tag, scalar.style = _STRING, "'"  # loaders differ on what is a number
    return bool(plain)


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _scalars(child)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for child in pair:
                yield from _scalars(child)


def quote_arguments(arguments: list[str]) -> list[str]:
    """Returns arguments of the command line in which lists of names are quoted.

    >>> quote_arguments(["--exclude_classes", "[001]", "--layers=[0, 1]"])
    ['--exclude_classes', "['001']", '--layers=[0, 1]']

    :param arguments: flags and values, ``--flag value`` or ``--flag=value``.
    """
    quoted = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            if equals:
                quoted[i] = f"{flag}={_quoted(flag, value)}"
            elif i + 1 < len(arguments):
                quoted[i + 1] = _quoted(flag, arguments[i + 1])
    return quoted


def _quoted(flag: str, value: str) -> str:
    name = flag.removeprefix("--").removesuffix("+").rpartition(".")[2]
    is_list = name in LISTS_OF_NAMES and value.strip().startswith(("[", "{"))
    return quote_names(value, name).rstrip("\n") if is_list else value


def _load(text: str) -> object:
    return jsonargparse.get_loader("yaml")(quote_names(text))


jsonargparse.set_loader(YAML_MODE, _load, (yaml.YAMLError,))
