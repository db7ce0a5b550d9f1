"""Tables of names that other packages extend through entry points."""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from treelora_avalanche.choices import check_known

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


class RegistrationError(ValueError):
    """The row of another package cannot be loaded."""


class Registry(UserDict[str, Row], Generic[Row]):
    """Rows by name: the library's own, then those of installed packages.

    A package registers a row by an entry point, whose name is that of the row and whose object is
    the row itself. Names are read from the metadata of the installed packages; a package is
    imported when its row is asked for. A package that cannot be imported makes its own rows fail,
    with a :class:`RegistrationError`, and no others.

    :param what: what a row is, for errors.
    :param group: group of the entry points.
    :param kind: class of the rows.
    :param built_in: the library's own rows, which other packages cannot replace.
    """

    def __init__(self, what: str, group: str, kind: type[Row], built_in: Mapping[str, Row]):
        self.what = what
        self.group = group
        self.kind = kind
        super().__init__(built_in)

    @cached_property
    def external(self) -> dict[str, EntryPoint]:
        """Entry points of other packages, by the name of their row."""
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
        """Returns a row, or the default where there is none of that name."""
        known = name in self
        return self[name] if known else default

    def __getitem__(self, name: str) -> Row:
        # An error for users, who name rows on the command line: with the nearest match.
        check_known(self.what, name, self)
        if name not in self.data:
            self.data[name] = self._load(self.external[name])
        return self.data[name]

    def _load(self, point: EntryPoint) -> Row:
        package = point.dist.name if point.dist else point.module
        try:
            row = point.load()
        except Exception as error:  # whatever another package's import raises
            raise RegistrationError(
                f"{self.what} {point.name} of the package {package} cannot be loaded "
                f"({type(error).__name__}: {error}). Mend or uninstall {package}."
            ) from error
        if not isinstance(row, self.kind):
            raise RegistrationError(
                f"{self.what} {point.name} of the package {package} should be a "
                f"{self.kind.__name__}, but {point.value} is a {type(row).__name__}. "
                f"Let the entry point name a `{self.kind.__name__}(...)`."
            )
        return row

    def loadable(self) -> Iterator[tuple[str, Row]]:
        """Yields name and row, without those that cannot be loaded."""
        for name in self:
            try:
                yield name, self[name]
            except RegistrationError as error:
                logger.warning("%s", error)


def load_object(path: str) -> Any:
    """Imports an object of an installed package.

    :param path: ``"package.module:name"``.
    :raises RegistrationError: if it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever another package's import raises
        raise RegistrationError(
            f"{path} cannot be imported ({type(error).__name__}: {error})."
        ) from error
