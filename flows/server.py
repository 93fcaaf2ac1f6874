"""Starts a Prefect server for this process if the settings name none.

Prefect would start one itself, but only after importing the whole server into this process, and the server would
survive if this process is killed. This one starts while the run imports its modules, and ends when its stdin closes.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from flows.guard import read_to_end
from lora_engine.errors import EngineError
from registry.errors import RegistryError
from tasks.errors import PipelineFailed

_STOP_TIMEOUT = 5.0  # seconds until the server is killed


@contextmanager
def prefect_server() -> Iterator[str]:
    """Yields the address of the server that flows in the `with` block use: the configured one, or a new one.

    Requests to a new server wait until it is ready. It lasts as long as this process.

    Raises:
        PipelineFailed: The new server ended and the block failed; names the server's log.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    configured = PREFECT_API_URL.value()
    if configured:
        yield str(configured)
        return
    address, process, log = _start()
    try:
        with temporary_settings({PREFECT_API_URL: address}):
            yield address
    except (EngineError, RegistryError):
        raise
    except Exception as error:
        if process.poll() is None:
            raise
        _start.cache_clear()
        raise PipelineFailed(
            f"Prefect's server ended with code {process.returncode}",
            where=str(log),
            remedy="see the end of that file; memory or the disk may be full",
        ) from error


@lru_cache(maxsize=1)
def _start() -> tuple[str, subprocess.Popen[bytes], Path]:
    from prefect.settings import PREFECT_HOME, get_current_settings

    log = Path(PREFECT_HOME.value()) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    # The socket listens already, so no other process can take the port and requests wait until the server is ready.
    with socket.create_server(("127.0.0.1", 0)) as listening, log.open("wb") as output:
        process = subprocess.Popen(
            # -P: Prefect projects often have a folder `flows`, which would shadow ours.
            [sys.executable, "-P", "-m", "flows.server", str(listening.fileno())],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C must not stop it: the run still reports its end to it
        )
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    atexit.register(_stop, process)
    return address, process, log


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(descriptor: int, *, lasting: bool = False) -> None:
    """Serves on a listening socket until standard input ends.

    Args:
        descriptor: File descriptor of the socket.
        lasting: True adds the user interface and the services, such as the scheduler, and refuses requests that are
            addressed to another host: a web page whose name resolves to 127.0.0.1 must not reach the API.
    """
    from lora_engine.lean import collection_paused

    with collection_paused():
        import uvicorn
        from prefect.server.api.server import create_app
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from flows.server_database import waiting_writers

    app: Any = create_app(ephemeral=not lasting, final=True)
    if lasting:
        app = TrustedHostMiddleware(app, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning" if lasting else "error", lifespan="on"))

    def wait_for_end() -> None:
        read_to_end(sys.stdin.fileno())
        server.should_exit = True

    threading.Thread(target=wait_for_end, daemon=True).start()
    with waiting_writers():
        server.run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]), lasting="--lasting" in sys.argv[2:])
