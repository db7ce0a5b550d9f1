"""Calls of the command line and scripts, one after another in the process of ``test_extension``."""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from treelora_avalanche.cli import main


def outcome(call):
    """Returns exit status, standard output and standard error of a command or a script."""
    printed, complaints = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            status = main(call) if isinstance(call, list) else exec(call, {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = 1
    return status or 0, printed.getvalue(), complaints.getvalue()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    calls = json.loads((folder / "calls.json").read_text())
    results = {name: outcome(call) for name, call in calls.items()}
    (folder / "results.json").write_text(json.dumps(results))
