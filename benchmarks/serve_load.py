"""Requests a second and latencies of `labeltune serve` on loopback, with dynamic batches and one request at a time.

    labeltune train examples/en_classification.yaml
    python benchmarks/serve_load.py --model RUN --data examples/data/en_classification_test.jsonl --json result.json

Two servers stand side by side with the same run: `batched` with the defaults, `one at a time` with batches of one text and no
waiting. Each is asked by 1, 8 and 32 clients that send one text, wait for the answer and send the next, with a connection each. Only one
of them is asked at any time; rounds are interleaved, and ratios are medians over rounds of ratios to the one-at-a-time server with
one client taken within a round. Latencies are seen by the client, over all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

SERVERS: dict[str, list[str]] = {
    "batched": [],
    "one at a time": ["--batch-rows=1", "--max-wait-ms=0"],
}
BASE = ("one at a time", 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a run folder or checkpoint")
    parser.add_argument("--data", required=True, help="jsonl with a `text` in every row")
    parser.add_argument("--route", choices=["classify", "extract"], default="classify")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the result here")
    return parser.parse_args()


def start(model: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "labeltune", "serve", model, "--port=0", "--no-playground", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if '"ready"' in line:
            return process, str(json.loads(line)["url"])
    raise SystemExit("the server did not start:\n" + "".join(said[-20:]))


async def measure(url: str, texts: Iterator[str], clients: int, seconds: float) -> dict[str, Any]:
    """Requests a second, and every latency in milliseconds."""
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=120, verify=False) as http:
        begun = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - begun < seconds:
                sent = time.perf_counter()
                answer = await http.post(url, json={"text": next(texts)})
                if answer.status_code != 200:
                    raise SystemExit(f"{answer.status_code}: {answer.text}")
                latencies.append((time.perf_counter() - sent) * 1000)

        await asyncio.gather(*(client() for _ in range(clients)))
        spent = time.perf_counter() - begun
    return {"rate": len(latencies) / spent, "latencies": latencies}


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def main() -> None:
    """Prints the table, writes the JSON."""
    given = arguments()
    lines = Path(given.data).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["text"] for line in lines if line.strip()]
    running = {name: start(given.model, options) for name, options in SERVERS.items()}
    # Logs go nowhere from here on; a full pipe would stop a server.
    drains = [
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        for process, _ in running.values()
    ]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    loads = []
    try:
        for number, name, clients in itertools.product(range(given.rounds), SERVERS, given.concurrency):
            texts = itertools.cycle(rows)
            url = f"{running[name][1]}/v1/{given.route}"
            if number == 0:
                asyncio.run(measure(url, texts, clients, 1))
            loads.append(os.getloadavg()[0])
            result = asyncio.run(measure(url, texts, clients, given.seconds))
            found.setdefault((name, clients), []).append(result)
            said = f"round {number + 1}/{given.rounds}  {name}, {clients} clients: {result['rate']:.2f} requests/s"
            print(said, file=sys.stderr, flush=True)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process in [*(process for process, _ in running.values()), *drains]:
            process.wait()
    records = []
    print(f"{given.route}, {Path(given.data).name}, {given.rounds} rounds of {given.seconds:g} s\n")
    print(
        "| server | clients | requests/s | to one at a time, one client | p50 ms | p95 ms | p99 ms | requests |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (name, clients), results in found.items():
        ratios = [r["rate"] / b["rate"] for r, b in zip(results, found.get(BASE, results), strict=True)]
        latencies = [latency for result in results for latency in result["latencies"]]
        record = {
            "server": name,
            "clients": clients,
            "requests_per_second": round(statistics.median(result["rate"] for result in results), 3),
            "ratio": round(statistics.median(ratios), 2),
            **{f"p{p}_ms": round(percentile(latencies, p), 1) for p in (50, 95, 99)},
            "requests": len(latencies),
        }
        records.append(record)
        print("| " + " | ".join(str(value) for value in record.values()) + " |")
    load = {"lowest": round(min(loads), 2), "highest": round(max(loads), 2), "cpus": os.cpu_count()}
    print(
        f"\nload average during the measurement: {load['lowest']} to {load['highest']} on {load['cpus']} CPUs"
    )
    if given.json:
        whole = {"route": given.route, "data": Path(given.data).name, "load": load, "records": records}
        Path(given.json).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
