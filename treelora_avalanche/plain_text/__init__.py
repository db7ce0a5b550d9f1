"""Plain text that is none of the tasks, on which the perplexity of language models is measured.

``english.txt`` holds 14 passages in the public domain: the Declaration of Independence, Lincoln
(Gettysburg, second inaugural), Paine (The American Crisis), Carroll, Austen, Melville, Dickens,
Thoreau, Darwin, Conan Doyle and Smith. Models have read them in pretraining, so that the perplexity
itself is low: it is the change that is of interest. Nothing heavy is imported. Example::

    passages = read_passages()  # of the package
    passages = read_passages("my.txt")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ENGLISH = Path(__file__).parent / "english.txt"


def read_passages(file: str | os.PathLike[str] | None = None) -> list[str]:
    """Returns the passages of a text file, which empty lines separate.

    :param file: the file, in UTF-8; by default the text of this package.
    :raises FileNotFoundError: if it does not exist.
    :raises ValueError: if it is not in UTF-8, or holds no text.
    """
    path = ENGLISH if file is None else Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"`--plain_text` should be a text file, but {path} is not a file. Correct the path."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--plain_text` should be in UTF-8, but {path} is not ({error.reason}). Convert it."
        ) from error
    passages = [passage.strip() for passage in re.split(r"\n\s*\n", text) if passage.strip()]
    if not passages:
        raise ValueError(f"`--plain_text` should hold text, but {path} is empty. Choose another.")
    return passages


__all__ = ["ENGLISH", "read_passages"]
