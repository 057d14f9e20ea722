"""One part in this process: python -m torture.one NAME FOLDER SEED SCALE RESULT."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from torture.common import Part, Settings


def main() -> None:
    """See the module."""
    name, folder, seed, scale, result = sys.argv[1:]
    part: Part = importlib.import_module(f"torture.part_{name}").run
    done = part(Settings(Path(folder).resolve(), int(seed), float(scale)))
    Path(result).write_text(json.dumps(done.to_dict(), ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
