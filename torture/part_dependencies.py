"""Known vulnerabilities of the pinned dependencies (pip-audit), and that they are pinned."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import tomllib

from torture.common import ROOT, PartResult, Settings

#: What a client says that has not reached its service.
UNREACHED = re.compile(
    r"ConnectionError|ServiceError|Max retries|Name or service|Temporary failure|timed out|Connection refused|ProxyError|HTTPError|403|404|502|503",
    re.I,
)


def run(settings: Settings) -> PartResult:
    """Every requirement has a pinned version; the auditor finds no known vulnerability in any, or says it was not asked."""
    result = PartResult("dependencies")
    pinned = dict(
        line.split("==", 1)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    names = {plain(name) for name in pinned}
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in wanted:
        name = re.split(r"[\[<>=!~; ]", requirement)[0]
        result.check(
            plain(name) in names
            or plain(name) in ("bitsandbytes", "wandb", "tensorboard", "ray", "pip", "setuptools"),
            f"{name} is not pinned in constraints.txt",
        )
        result.check("<" not in requirement, f"{requirement}: upper bounds belong into constraints.txt")
    result.notes.append(f"{len(pinned)} versions pinned")
    if importlib.util.find_spec("pip_audit") is None:
        result.notes.append(
            "pip-audit skipped: it is not installed (pip install -c constraints.txt '.[torture]')"
        )
        return result
    listed = settings.folder / "pinned.txt"
    listed.write_text("".join(f"{name}=={version}\n" for name, version in pinned.items()), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(listed),
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
    ]
    try:
        done = subprocess.run([*command, "--timeout", "20"], capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        result.notes.append("pip-audit skipped: could not reach the service")
        return result
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        if UNREACHED.search(done.stderr):
            result.notes.append("pip-audit skipped: could not reach the service")
        else:
            result.check(False, f"pip-audit: exit code {done.returncode}: {done.stderr[-300:]}")
        return result
    asked = [entry for entry in found if "vulns" in entry]
    if not asked:
        result.notes.append("pip-audit skipped: could not reach the service, which knew none of the packages")
        return result
    result.inputs += len(asked)
    for entry in asked:
        known = ", ".join(v["id"] for v in entry["vulns"])
        result.check(not known, f"{entry['name']} {entry['version']}: {known}")
    result.notes.append(
        f"pip-audit: {len(asked)} packages asked for, {len(found) - len(asked)} unknown to it"
    )
    return result


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
