"""`loraline serve` under load on loopback: four tenants with mixed adapters, canceled, malformed and slow requests.

Reports latencies, errors, growth of memory and shares of the tenants. `tests/flows/web/test_load.py` runs it, too.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.flows.web.server import Serving, make_home, stop, write_tokens

TENANTS = ("ann", "ben", "carl", "dora")
REFS = ("zorb", "zorb@1", "zorb@2", "ring")
_SETTLED = 0.3
"""Share of the time after which the growth of memory is measured."""


@dataclass
class Load:
    """What was observed.

    Attributes:
        latencies: Seconds of each synchronous request that was drawn.
        statuses: Number of answers by kind of request and status.
        unexpected: Answers and events that a server must not give.
        images: Images by tenant, of the two tenants that always ask for more.
        memory: Resident bytes of the server over time.
    """

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, kind: str, answer: httpx.Response, *allowed: int) -> None:
        """Counts an answer."""
        with self.lock:
            self.statuses[kind, answer.status_code] += 1
            if answer.status_code not in allowed:
                self.unexpected.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

    def report(self) -> dict[str, Any]:
        """Returns the figures."""
        ordered = sorted(self.latencies)
        begin = self.memory[int(len(self.memory) * _SETTLED)][1]
        shares = [self.images[tenant] for tenant in TENANTS[:2]]
        return {
            "requests": sum(self.statuses.values()),
            "drawn": len(ordered),
            "p50_s": round(ordered[len(ordered) // 2], 3),
            "p99_s": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 3),
            "unexpected": self.unexpected[:10],
            "statuses": {f"{kind} {status}": count for (kind, status), count in sorted(self.statuses.items())},
            "memory_mib": [size >> 20 for _, size in (self.memory[0], self.memory[-1])],
            "memory_growth_mib": round((self.memory[-1][1] - begin) / 2**20, 1),
            "images_many_clients": shares[0],
            "images_few_clients": shares[1],
            "fairness": round(min(shares) / max(shares), 3) if max(shares) else 0.0,
        }


def run_load(folder: Path, seconds: float, *options: str) -> tuple[dict[str, Any], int]:
    """Loads a server for some seconds; returns the figures, and the exit code of the server after SIGTERM.

    Args:
        folder: An empty folder.
        seconds: Duration.
        options: More options of `loraline serve`.
    """
    tokens = dict(zip(TENANTS, write_tokens(folder / "tokens.yaml", *((name, name) for name in TENANTS)), strict=True))
    serving, load, stopped = Serving(make_home(folder)), Load(), threading.Event()
    fixed = ("--no-studio", "--tokens", str(folder / "tokens.yaml"), "--queue", "16", "--rate", "0", "--grace", "5")
    with serving.running(*fixed, *options) as process:
        jobs: list[tuple[Callable[..., None], str]] = [(_draw, "ann")] * 6 + [(_draw, "ben")] * 2
        jobs += [(_queue_and_cancel, "carl"), (_send_nonsense, "dora"), (_send_slowly, "dora"), (_flood, "carl")]
        threads = [
            threading.Thread(target=_repeat, args=(work, serving, tokens[name], name, load, stopped, index))
            for index, (work, name) in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        own, ends = psutil.Process(process.pid), time.monotonic() + seconds
        while time.monotonic() < ends:
            load.memory.append((time.monotonic(), own.memory_info().rss))
            if not own.is_running():
                load.unexpected.append("the server ended")
                break
            time.sleep(min(1.0, seconds / 10))
        stopped.set()
        for thread in threads:
            thread.join()
        code, errors = stop(process)
        if "Traceback" in errors:
            load.unexpected.append(errors[-2000:])
    return load.report(), code


def _repeat(
    work: Callable[..., None],
    serving: Serving,
    token: str,
    name: str,
    load: Load,
    stopped: threading.Event,
    seed: int,
) -> None:
    chance = random.Random(seed)
    with serving.client(token) as client:
        while not stopped.is_set():
            try:
                work(client, name, load, chance)
            except httpx.TransportError as error:
                with load.lock:
                    load.unexpected.append(f"{work.__name__}: {error!r}")
                return


def _body(chance: random.Random, **changes: Any) -> dict[str, Any]:
    prompt = f"a {chance.choice(('red', 'blue'))} zorb <lora:{chance.choice(REFS)}:{chance.choice((0.4, 0.9))}>"
    return {"prompt": prompt, "steps": 4, "seed": chance.randrange(1000), **changes}


def _draw(client: httpx.Client, tenant: str, load: Load, chance: random.Random) -> None:
    """Draws without a pause: six clients of one tenant, and two of another."""
    started = time.monotonic()
    answer = client.post("/v1/images", json=_body(chance))
    load.see("draw", answer, 200, 429, 503)
    if answer.status_code == 200:
        with load.lock:
            load.latencies.append(time.monotonic() - started)
            load.images[tenant] += 1
    else:
        time.sleep(0.2)


def _queue_and_cancel(client: httpx.Client, tenant: str, load: Load, chance: random.Random) -> None:
    del tenant
    answer = client.post("/v1/jobs", json=_body(chance, steps=60))
    load.see("queue", answer, 202, 429, 503)
    if answer.status_code == 202:
        path = f"/v1/jobs/{answer.json()['id']}"
        time.sleep(chance.random() * 0.5)
        load.see("preview", client.get(f"{path}/preview"), 200, 204)
        load.see("cancel", client.delete(path), 200)
        load.see("read", client.get(path), 200)
    with suppress(httpx.TimeoutException):  # a client that goes away
        client.post("/v1/images", json=_body(chance, steps=60), timeout=0.3)
    time.sleep(0.3)


def _send_nonsense(client: httpx.Client, tenant: str, load: Load, chance: random.Random) -> None:
    del tenant
    contents = (b"{", b"\xff\xfe", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "x": 1}', b"[" * 5000, b"null")
    load.see("nonsense", client.post("/v1/jobs", content=chance.choice(contents)), 400, 422)
    bad = (
        b'{"prompt": "a <lora:none:1>"}',
        b'{"prompt": "a <lora:../x:1>"}',
        b'{"prompt": "a", "image": "/etc/passwd"}',
    )
    load.see("refused", client.post("/v1/jobs", content=chance.choice(bad)), 404, 422)
    load.see("foreign", client.get("/v1/jobs", headers={"Host": "evil.example"}), 400)
    load.see("unknown", client.get(f"/v1/jobs/{'0' * 32}"), 404)
    load.see("health", client.get("/readyz"), 200)
    load.see("metrics", client.get("/metrics"), 200)
    time.sleep(0.1)


def _send_slowly(client: httpx.Client, tenant: str, load: Load, chance: random.Random) -> None:
    """Opens a connection, sends a part of a request byte by byte, and leaves."""
    del tenant, load
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, int(port or 80)), timeout=10) as slow:
        for byte in b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"[: chance.randrange(70)]:
            slow.sendall(bytes([byte]))
            time.sleep(0.01)


def _flood(client: httpx.Client, tenant: str, load: Load, chance: random.Random) -> None:
    """Queues more than a tenant may, now and then."""
    del tenant
    for _ in range(12):
        load.see("flood", client.post("/v1/jobs", json=_body(chance, steps=1)), 202, 429, 503)
    time.sleep(1.5)


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("options", nargs="*", help="options of `loraline serve`, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, code = run_load(Path(folder), arguments.seconds, *arguments.options)
    print(json.dumps({**figures, "exit_code": code}, indent=2))


if __name__ == "__main__":
    main()
