"""The labelling loop with Label Studio itself, in a browser: connect, see pre-annotations, annotate, train from the page, see the new model.

    make label-studio

Label Studio gets an environment of its own (`.venv-label-studio`), a folder of its own and SQLite. For choices and for entities, a project
is made and connected to `labeltune serve --label-studio` on its settings page; its tasks open with what the model says, ten are submitted,
training starts from the page, and the new model answers. Screenshots and the requests that Label Studio sent go to `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
VERSION = "1.23.2"
USER, PORT = "one@example.com", 8091
PREFIX = "/v1/label-studio"
ANNOTATED = 10
#: Emoji stand before and within it.
FIRST = {"text": "😀 Maria Lopez opened a shop in Madrid 👩‍👩‍👧 and Peter Smith one in Lisbon."}
#: Seconds until a page or a server has to be ready, or a training done.
PATIENCE = 2700


def label_studio_program() -> Path:
    """Label Studio, installed where it was not."""
    folder = ROOT / ".venv-label-studio"
    program = folder / "bin" / "label-studio"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", f"label-studio=={VERSION}"], check=True)
    return program


@contextlib.contextmanager
def running(command: list[str], log: Path, ready: Callable[[], bool], **environment: str) -> Iterator[None]:
    """A server, until the end of the block."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **environment})
        try:
            until(ready, f"{command[0]} (see {log})", process)
            yield
        finally:
            process.terminate()
            process.wait(60)


def until(ready: Callable[[], Any], what: str, process: subprocess.Popen[bytes] | None = None) -> Any:
    """Wait for something that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if found := ready():
                return found
        if process is not None and process.poll() is not None:
            break
        time.sleep(1)
    raise SystemExit(f"waited in vain for {what}")


def answers(url: str) -> Callable[[], bool]:
    """Whether something listens there."""
    return lambda: httpx.get(url, trust_env=False, timeout=5).status_code < 500


class Recorder(BaseHTTPRequestHandler):
    """Passes requests on to the backend, and keeps the first of each kind."""

    target: str
    kept: dict[str, dict[str, Any]]

    def do_GET(self) -> None:
        """Passed on."""
        self._pass_on(None)

    def do_POST(self) -> None:
        """Passed on, and kept."""
        self._pass_on(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _pass_on(self, body: bytes | None) -> None:
        headers = {"content-type": "application/json"}
        found = httpx.request(
            self.command,
            self.target + self.path,
            content=body,
            headers=headers,
            timeout=PATIENCE,
            trust_env=False,
        )
        sent = json.loads(body) if body else None
        action = (sent or {}).get("action", "") if isinstance(sent, dict) else ""
        name = f"{self.command} {self.path.removeprefix(PREFIX)} {action}".strip()
        self.kept.setdefault(name, {"request": sent, "status": found.status_code, "response": found.json()})
        self.send_response(found.status_code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(found.content)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@contextlib.contextmanager
def recorded(target: str, kept: dict[str, dict[str, Any]]) -> Iterator[str]:
    """An address that passes on to another one."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (Recorder,), {"target": target, "kept": kept})
    )
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()


CONFIGURATIONS = {
    "choices": '<View><Text name="document" value="$text"/><Choices name="topic" toName="document" choice="single">{values}</Choices></View>',
    "entities": '<View><Labels name="names" toName="document">{values}</Labels><Text name="document" value="$text"/></View>',
}


def make_project(api: httpx.Client, kind: str, labels: list[str], rows: list[dict[str, Any]]) -> int:
    """A project with tasks, whose predictions are fetched when a task is opened."""
    tag = "Choice" if kind == "choices" else "Label"
    values = "".join(f'<{tag} value="{label}"/>' for label in labels)
    made = api.post(
        "/api/projects", json={"title": kind, "label_config": CONFIGURATIONS[kind].format(values=values)}
    )
    number = int(made.raise_for_status().json()["id"])
    api.post(
        f"/api/projects/{number}/import", json=[{"text": row["text"]} for row in rows]
    ).raise_for_status()
    api.patch(
        f"/api/projects/{number}",
        json={"show_collab_predictions": True, "evaluate_predictions_automatically": True},
    ).raise_for_status()
    return number


def loop(view: Any, api: httpx.Client, kind: str, number: int, backend: str, out: Path) -> dict[str, Any]:
    """One project from connection to the new model."""
    site = f"http://localhost:{PORT}"
    view.goto(f"{site}/projects/{number}/settings/ml")
    view.get_by_text("Connect Model").first.click()
    view.fill("input[name=title]", "labeltune")
    view.fill("input[name=url]", f"{backend}{PREFIX}")
    view.get_by_text("Validate and Save").click()
    (connected,) = until(lambda: api.get("/api/ml", params={"project": number}).json(), "the connection")
    view.goto(f"{site}/projects/{number}/data")
    view.get_by_text("Label All Tasks").click()
    for done in range(ANNOTATED):
        submit = view.locator("button:has-text('Submit')").first
        submit.wait_for()
        time.sleep(1)
        if not done:
            view.screenshot(path=out / f"label-studio-{kind}.png")
        submit.click()
        until(
            lambda done=done: api.get(f"/api/projects/{number}").json()["total_annotations_number"] > done,
            f"annotation {done + 1}",
        )
    before = api.get("/api/ml", params={"project": number}).json()[0]["model_version"]
    view.goto(f"{site}/projects/{number}/settings/ml")
    view.get_by_text("Connected", exact=True).first.wait_for()
    view.locator("[class*=backend-card] button, [class*=BackendCard] button, .ls-ml button").last.click()
    view.screenshot(path=out / f"label-studio-{kind}-model.png")
    view.get_by_text("Start Training", exact=True).first.click()
    # The menu opens a dialog, whose button has the same words.
    view.locator("button:has-text('Start Training')").last.click()
    time.sleep(2)
    view.screenshot(path=out / f"label-studio-{kind}-training.png")
    health = f"{backend}{PREFIX}/health"
    begun = ("running", "queued")
    until(
        lambda: httpx.get(health, trust_env=False).json()["training"]["state"] != "idle",
        "the start of training",
    )
    state = until(
        lambda: (
            (told := httpx.get(health, trust_env=False).json())["training"]["state"] not in begun and told
        ),
        "the end of training",
    )
    view.goto(f"{site}/projects/{number}/data")
    view.get_by_text("Label All Tasks").click()
    view.locator("button:has-text('Submit')").first.wait_for()
    for form in (
        ("JSON", "JSON_MIN", "CSV", "CONLL2003") if kind == "entities" else ("JSON", "JSON_MIN", "CSV")
    ):
        export = api.get(f"/api/projects/{number}/export", params={"exportType": form})
        (out / f"{kind}.{form}").write_bytes(export.raise_for_status().content)
    after = api.get("/api/ml", params={"project": number}).json()[0]["model_version"]
    found = {
        "connected": connected["readable_state"],
        "before": before,
        "after": after,
        "training": state["training"],
    }
    predictions = api.get("/api/predictions", params={"project": number}).json()
    found["predictions"] = {v: sum(p["model_version"] == v for p in predictions) for v in (before, after)}
    return found


def main() -> None:
    """Both projects; exit code 1 where the new model of one does not answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--choices", help="a trained run that gives one label a row")
    parser.add_argument("--entities", help="a trained run that extracts entities")
    parser.add_argument("--choices-rows", default="examples/data/en_classification_test.jsonl")
    parser.add_argument("--entities-rows", default="examples/data/en_ner_test.jsonl")
    parser.add_argument("--label-studio", help="the program; installed when missing")
    parser.add_argument("--out", type=Path, default=Path("label-studio-session"))
    given = parser.parse_args()
    out = given.out.resolve()
    shutil.rmtree(out / "data", ignore_errors=True)
    (out / "data").mkdir(parents=True)
    program = given.label_studio or str(label_studio_program())
    password, token = secrets.token_hex(8), secrets.token_hex(20)
    # Label Studio refuses backends of this machine unless it is told otherwise, and tells them port 8080 whichever it listens on.
    settings = {
        "LABEL_STUDIO_HOST": f"http://localhost:{PORT}",
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    settings["LABEL_STUDIO_BASE_DATA_DIR"] = str(out / "data")
    start = [
        program,
        "start",
        "--no-browser",
        "--port",
        str(PORT),
        "--data-dir",
        str(out / "data"),
        "--username",
        USER,
    ]
    start += ["--password", password, "--user-token", token, "--enable-legacy-api-token"]
    from playwright.sync_api import Error as PlaywrightError
    from playwright.sync_api import sync_playwright

    kept: dict[str, dict[str, dict[str, Any]]] = {}
    told = {}
    api = httpx.Client(
        base_url=f"http://localhost:{PORT}",
        headers={"Authorization": f"Token {token}"},
        timeout=120,
        trust_env=False,
    )
    site = f"http://localhost:{PORT}"
    with (
        running(start, out / "label-studio.log", answers(f"{site}/health"), **settings),
        sync_playwright() as started,
    ):
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1400, "height": 800})
        view.set_default_timeout(60_000)
        view.goto(f"{site}/user/login")
        view.fill("input[name=email]", USER)
        view.fill("input[name=password]", password)
        view.keyboard.press("Enter")
        view.wait_for_url(lambda url: "login" not in url)
        for port, kind in ((8095, "choices"), (8096, "entities")):
            if getattr(given, kind) is None:
                continue
            run = out / kind
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(getattr(given, kind), run, symlinks=True)
            labels = json.loads((run / "best" / "labeltune.json").read_text(encoding="utf-8"))["labels"]
            lines = Path(getattr(given, f"{kind}_rows")).read_text(encoding="utf-8").splitlines()
            # Texts with entities first: the screenshot shows one, and one whose characters are of several lengths in UTF-16.
            rows = sorted(map(json.loads, lines[:20]), key=lambda row: not row.get("entities", True))
            number = make_project(api, kind, labels, [FIRST, *rows] if kind == "entities" else rows)
            serve = [
                sys.executable,
                "-m",
                "labeltune",
                "serve",
                str(run),
                "--label-studio",
                "--no-playground",
                "--port",
                str(port),
            ]
            address = f"http://localhost:{port}"
            with (
                running(serve, out / f"{kind}.log", answers(f"{address}/readyz")),
                recorded(address, kept.setdefault(kind, {})) as backend,
            ):
                try:
                    told[kind] = loop(view, api, kind, number, backend, out)
                except PlaywrightError:
                    view.screenshot(path=out / "failed.png")
                    raise
                print(kind, json.dumps(told[kind]), flush=True)
        browser.close()
    (out / "recorded.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "result.json").write_text(
        json.dumps({"label_studio": VERSION, **told}, indent=2) + "\n", encoding="utf-8"
    )
    good = all(
        each["training"]["state"] in ("completed", "kept") and each["predictions"][each["before"]]
        for each in told.values()
    )
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
