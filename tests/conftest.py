"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data and pretrained weights; skips the test where it is missing."""
    root = Path(os.environ.get("TREELORA_DATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data: {root} is not a folder (set TREELORA_DATA)")
    return root
