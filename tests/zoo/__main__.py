"""`python -m zoo`, in tests/: some families one after the other, a JSON file each."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path

from zoo.families import BY_NAME
from zoo.run import FORMATS, TASKS, run_family


def main() -> None:
    """Run the families that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--format", choices=FORMATS)
    given = parser.parse_args()
    os.environ.setdefault("LABELTUNE_LANG", "en")
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.families or BY_NAME:
        with tempfile.TemporaryDirectory(prefix=f"zoo-{name}-") as folder:
            tasks = (given.task,) if given.task else TASKS
            result = run_family(
                BY_NAME[name], Path(folder), tasks, (given.format,) if given.format else FORMATS
            )
        (given.output / f"{name}.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        print(name, f"{result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
