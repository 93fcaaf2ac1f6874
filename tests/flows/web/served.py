"""Runs the application on a loopback port, with the embedded base and two registered adapters, for real clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from flows.web.app import WebSettings, create_app
from lora_engine.compute import threads
from lora_engine.formats import Card
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.made import write_random


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Args:
        port: Its port on 127.0.0.1.
        service: Its service.
    """

    port: int
    service: ImageService

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


def make_home(folder: Path) -> None:
    """Makes a home with `zorb@1`, which has the alias `production`, and `ring@1`, which has `staging`."""
    home = Home.open(folder / "home")
    # Imported adapters have no evaluation, which the default policy of these aliases needs.
    open_policy = {"needs_evaluation": False, "needs_gate": False, "needs_licence": "none", "needs_consent": "none"}
    policies = {"aliases": dict.fromkeys(("production", "staging"), open_policy)}
    (home.path / "policy.yaml").write_text(json.dumps(policies))
    for seed, (name, alias) in enumerate([("zorb", "production"), ("ring", "staging")]):
        write_random(folder / name, seed, form="loraline", card=Card(title=name, base="tiny", license="MIT"))
        with closing(Versions(home)) as versions:
            versions.register(name, versions.store.put("adapter", folder / name), card={"base": "tiny"})
            promote(versions, name, 1, alias, reason="a test")


@contextmanager
def serving(home: Home, **settings: Any) -> Iterator[Served]:
    """Runs a server in a thread while the context is open."""
    with threads(1):
        service = ImageService(home, ServiceSettings(max_steps=1000, **settings), PlainEngine("tiny"))
        application = create_app(service, WebSettings(requests_per_minute=0))
        server = uvicorn.Server(
            uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(server.servers[0].sockets[0].getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()
            service.close()
