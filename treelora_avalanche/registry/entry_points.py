"""Registries that other packages extend through entry points."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from treelora_avalanche.choices import check_known

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


class RegistrationError(ValueError):
    """Raised if the row of another package cannot be loaded."""


class Registry(UserDict[str, Row], Generic[Row]):
    """Mapping of names to rows: the built-in ones, then those of installed packages.

    An entry point registers a row: its name is that of the row, its object the row itself. Names
    are read from the metadata of installed packages; a package is imported when its row is looked
    up. A package that cannot be imported raises :class:`RegistrationError` for its own rows only.

    >>> METHODS["TreeLoRA"].description
    >>> METHODS["TreLoRA"]
    Traceback (most recent call last):
    ValueError: method should be one of TreeLoRA, ..., but is 'TreLoRA'. Did you mean 'TreeLoRA'?

    :param what: name of a row in errors.
    :param group: group of the entry points.
    :param kind: class of the rows.
    :param built_in: the built-in rows, which other packages cannot replace.
    """

    def __init__(self, what: str, group: str, kind: type[Row], built_in: Mapping[str, Row]):
        self.what = what
        self.group = group
        self.kind = kind
        super().__init__(built_in)

    @cached_property
    def external(self) -> dict[str, EntryPoint]:
        """Entry points of other packages, by name of the row."""
        found = entry_points(group=self.group)
        taken = sorted({point.name for point in found} & set(self.data))
        if taken:
            logger.warning(
                "%s is a %s of this library; the other one is ignored", *taken, self.what
            )
        return {point.name: point for point in found if point.name not in taken}

    def __iter__(self) -> Iterator[str]:
        yield from self.data
        yield from (name for name in self.external if name not in self.data)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.data or name in self.external

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a row, or the default if the name is unknown.

        :param name: name of the row.
        :param default: the default.
        """
        known = name in self
        return self[name] if known else default

    def __getitem__(self, name: str) -> Row:
        # Not a KeyError: users type names on the command line, and need the nearest match.
        check_known(self.what, name, self)
        if name not in self.data:
            self.data[name] = self._load(self.external[name])
        return self.data[name]

    def _load(self, point: EntryPoint) -> Row:
        package = point.dist.name if point.dist else point.module
        try:
            row = point.load()
        except Exception as error:  # importing another package may raise anything
            raise RegistrationError(
                f"{self.what} {point.name} of the package {package} cannot be loaded "
                f"({type(error).__name__}: {error}). Fix or uninstall {package}."
            ) from error
        if not isinstance(row, self.kind):
            raise RegistrationError(
                f"{self.what} {point.name} of the package {package} should be a "
                f"{self.kind.__name__}, but {point.value} is a {type(row).__name__}. "
                f"Point the entry point to a `{self.kind.__name__}(...)`."
            )
        return row

    def loadable(self) -> Iterator[tuple[str, Row]]:
        """Yields names and rows; rows that cannot be loaded are skipped with a warning."""
        for name in self:
            try:
                yield name, self[name]
            except RegistrationError as error:
                logger.warning("%s", error)


def load_object(path: str) -> Any:
    """Imports an object of an installed package.

    >>> load_object("treelora_avalanche.strategies:SeqLoRA")

    :param path: ``"package.module:name"``.
    :raises RegistrationError: if the import fails.
    """
    try:
        return EntryPoint("object", path, group="").load()
    except Exception as error:  # importing another package may raise anything
        raise RegistrationError(
            f"{path} cannot be imported ({type(error).__name__}: {error}). Fix or reinstall its "
            "package."
        ) from error
