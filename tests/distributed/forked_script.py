"""A script in a process that has imported what it imports, and done nothing: `main(SCRIPT, *FLAGS)`."""

import runpy
import sys
from pathlib import Path


def main(script: str, *flags: str) -> None:
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
