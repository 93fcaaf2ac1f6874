"""Defines the verbs `serve`, `studio` and `token`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import BASE_HELP, Json
from flows.cli.verbs import Access, add_verb, open_home
from tasks.serving import EngineName

if TYPE_CHECKING:
    from flows.web.server import Listening

_MAX_PORT = 65535
_MAX_QUEUE = 10_000
_MIB = 1 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
token_app = typer.Typer(help="Make and remove the tokens of `loraline serve`.", no_args_is_help=True)
TokenFile = Annotated[Path, typer.Option("--file", metavar="FILE", help="File with the tokens' digests.")]


def add_verbs(app: typer.Typer) -> None:
    """Adds the verbs."""
    add_verb(app, Access.WRITE, serve, studio)
    add_verb(token_app, Access.NONE, new_token, name="new")
    add_verb(token_app, Access.NONE, list_tokens, name="list")
    add_verb(token_app, Access.NONE, remove_token, name="remove")
    app.add_typer(token_app, name="token")


def serve(
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "tiny",
    engine: Annotated[
        EngineName,
        typer.Option(help="Adapters: static fuses --adapter once, dynamic takes them by request, compiled too."),
    ] = "dynamic",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Option of the engine, such as rank=32 (compiled); repeatable."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME@REF[:WEIGHT]", help="Adapter of every image (static); repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=_MAX_PORT, help="Port; 0 takes a free one.")] = 8188,
    public_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name in the header Host that is answered, too; repeatable."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens of the users; see `loraline token new`.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="FILE", help="TLS certificate chain (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Private key of --tls-certificate.")] = None,
    behind_proxy: Annotated[bool, typer.Option(help="A proxy in front of the server ends TLS.")] = False,
    queue: Annotated[int, typer.Option(min=1, max=_MAX_QUEUE, help="Number of jobs that may wait.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Number of images in one batch.")] = 8,
    cache: Annotated[int, typer.Option(min=1, metavar="MIB", help="MiB of adapter files kept on disk.")] = 4096,
    keep: Annotated[str, typer.Option(metavar="TIME", help="Time for which ended jobs are kept, such as 24h.")] = "24h",
    keep_size: Annotated[int, typer.Option(min=1, metavar="MIB", help="MiB of images that are kept.")] = 4096,
    max_images: Annotated[int, typer.Option(min=1, max=64, help="Number of images of one request.")] = 16,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Number of steps of one request.")] = 150,
    max_pixels: Annotated[int, typer.Option(min=64, help="Number of pixels of an image.")] = 2048 * 2048,
    max_body: Annotated[int, typer.Option(min=1, max=512, metavar="MIB", help="MiB of the body of a request.")] = 48,
    rate: Annotated[int, typer.Option(min=0, help="Requests per minute of one tenant; 0 is unlimited.")] = 1200,
    safety: Annotated[
        str | None, typer.Option(metavar="PACKAGE:FUNCTION", help="Function that may refuse images before they leave.")
    ] = None,
    studio: Annotated[bool, typer.Option(help="Serve the studio page at /studio.")] = True,
    grace: Annotated[int, typer.Option(min=0, max=3600, help="Seconds in which running jobs may finish.")] = 10,
    as_json: Json = False,
) -> None:
    """Serve images by registered adapters over HTTP until Ctrl-C or SIGTERM."""
    from flows.web.app import WebSettings
    from flows.web.server import Listening
    from flows.web.serving import serve_images
    from tasks.operations.adapter_files import parse_settings
    from tasks.operations.maintenance import parse_time
    from tasks.serving.settings import ServiceSettings

    _require_protection(host, tokens, tls_certificate, tls_key, behind_proxy, public_host)
    settings = ServiceSettings(
        base=base,
        engine=engine,
        engine_options=parse_settings(option or ()),
        adapters=tuple(adapter or ()),
        queue_limit=queue,
        batch_images=batch,
        cache_bytes=cache * _MIB,
        keep_hours=parse_time(keep) / 3600,
        keep_bytes=keep_size * _MIB,
        max_images=max_images,
        max_steps=max_steps,
        max_pixels=max_pixels,
        safety=safety,
    )
    web = WebSettings(
        hosts=_header_hosts(host, public_host or ()),
        tokens=tokens,
        is_secure=tls_certificate is not None or behind_proxy,
        studio=studio,
        max_body=max_body * _MIB,
        requests_per_minute=rate,
    )
    listening = Listening(host, port, tls_certificate, tls_key, grace=grace)

    def announce(port: int) -> None:
        _print(listening, port, has_studio=studio, as_json=as_json)

    serve_images(open_home(), settings, web, listening, announce)


def studio(
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "tiny",
    port: Annotated[int, typer.Option(min=0, max=_MAX_PORT, help="Port; 0 takes a free one.")] = 8188,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    as_json: Json = False,
) -> None:
    """Serve the studio page on this machine and open it, until Ctrl-C or SIGTERM; `serve` has more options."""
    import webbrowser

    from flows.web.app import WebSettings
    from flows.web.server import Listening
    from flows.web.serving import serve_images
    from tasks.serving.settings import ServiceSettings

    listening = Listening(port=port)

    def announce(port: int) -> None:
        _print(listening, port, has_studio=True, as_json=as_json)
        if browser:
            webbrowser.open(f"http://{listening.host}:{port}/studio")

    serve_images(open_home(), ServiceSettings(base=base), WebSettings(studio=True), listening, announce)


def new_token(
    user: Annotated[str, typer.Argument(metavar="USER", help="User whom the token establishes, such as ann@lab.org.")],
    file: TokenFile,
    tenant: Annotated[
        str, typer.Option(help="Tenant: its jobs are not shown to others, and share the engine equally with theirs.")
    ] = "default",
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="Validity, such as 30d. Default: unlimited.")
    ] = None,
) -> None:
    """Print a new token, and add its digest to a file. Keep the token secret; it is shown once."""
    from flows.web.tokens import add_token
    from tasks.operations.maintenance import parse_time

    token, _ = add_token(file, user, tenant, None if expires is None else parse_time(expires))
    print(token)


def list_tokens(file: TokenFile, as_json: Json = False) -> None:
    """List the users of the tokens in a file."""
    from flows.cli.output import print_json, print_table
    from flows.web.tokens import read_tokens

    entries = read_tokens(file)
    if as_json:
        print_json([entry.model_dump(mode="json") | {"valid": entry.is_valid} for entry in entries])
        return
    rows = [(entry.user, entry.tenant, entry.expires or "", entry.sha256[:12]) for entry in entries]
    print_table(("user", "tenant", "expires", "sha256"), rows)


def remove_token(
    user: Annotated[str, typer.Argument(metavar="USER", help="User whose tokens are removed.")], file: TokenFile
) -> None:
    """Remove the tokens of a user from a file; a running server refuses them at once."""
    from flows.web.tokens import remove_tokens

    print(f"removed {remove_tokens(file, user)} tokens of {user}")


def _require_protection(
    host: str,
    tokens: Path | None,
    certificate: Path | None,
    key: Path | None,
    behind_proxy: bool,
    public_host: list[str] | None,
) -> None:
    """Raises an error if others could use the server without a token, or could read one on the network."""
    from tasks.errors import SpecError

    if (certificate is None) != (key is None):
        raise SpecError("TLS needs two files", remedy="set both --tls-certificate and --tls-key")
    if host in _LOOPBACK:
        return
    if tokens is None:
        raise SpecError(
            f"--host {host} is reachable from other machines",
            allowed=f"{', '.join(_LOOPBACK)} without tokens",
            remedy="set --tokens; make them with `loraline token new USER --file tokens.yaml`",
        )
    if certificate is None and not behind_proxy:
        raise SpecError(
            f"--host {host} would send tokens unencrypted",
            remedy="set --tls-certificate and --tls-key, or --behind-proxy if a proxy ends TLS",
        )
    if host in {"0.0.0.0", "::"} and not public_host:  # noqa: S104 (compared, not bound)
        raise SpecError(f"--host {host} is no name that a browser sends", remedy="name the server's with --public-host")


def _header_hosts(host: str, public_hosts: Sequence[str]) -> tuple[str, ...]:
    """Returns the values of the header `Host` that are answered: those of loopback, of the address, and public ones."""
    own, loopback = f"[{host}]" if ":" in host else host.lower(), ("127.0.0.1", "localhost", "[::1]")
    return (*loopback, *({own} - {*loopback}), *map(str.lower, public_hosts))


def _print(listening: Listening, port: int, *, has_studio: bool, as_json: bool) -> None:
    import json
    import os
    import sys

    from flows.cli.output import print_facts

    host = f"[{listening.host}]" if ":" in listening.host else listening.host
    address = f"{'https' if listening.certificate else 'http'}://{host}:{port}"
    facts = {"address": address, "studio": f"{address}/studio" if has_studio else None}
    if as_json:
        print(json.dumps({**facts, "pid": os.getpid()}))  # one line: a script reads it while the command runs
    else:
        print_facts([*facts.items(), ("endpoints", f"{address}/openapi.json"), ("stop", "Ctrl-C")])
    sys.stdout.flush()
