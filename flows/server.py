"""A Prefect server for this process, for when the settings name none.

Prefect would start one by itself: after importing the whole server into this process too, and without an end when this
process is killed. Ours starts while the run imports what it needs, and ends when the pipe to its maker closes.
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

from lora_engine.errors import EngineError
from registry.errors import RegistryError
from tasks.errors import PipelineFailed

_PATIENCE = 5.0  # seconds that the server has to end by itself


@contextmanager
def prefect_server() -> Iterator[str]:
    """Gives the address of the server that flows within the block talk to: the one that is named, or one of our own.

    Ours answers requests as soon as it is ready; until then they wait. It lasts as long as this process.

    Raises:
        PipelineFailed: Our server ended, and so did what ran in the block; names the file with its words.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    named = PREFECT_API_URL.value()
    if named:
        yield str(named)
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
    # The socket listens from here on, so that no one else takes the port and no one has to ask whether it is ready.
    with socket.create_server(("127.0.0.1", 0)) as listening, log.open("wb") as words:
        process = subprocess.Popen(
            # -P: many a Prefect project has a folder `flows`, which would be taken for ours.
            [sys.executable, "-P", "-m", "flows.server", str(listening.fileno())],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=words,
            pass_fds=[listening.fileno()],
            start_new_session=True,  # Ctrl-C is for the run, which still has to tell the server how it ended
        )
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
    atexit.register(_stop, process)
    return address, process, log


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _serve(descriptor: int) -> None:
    """Serves on a listening socket until the standard input ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
