"""What a request must pass: Host, Origin, tokens, sessions, bounds; and as whom the server acts in the registry."""

from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvicorn
from starlette.requests import Request
from starlette.testclient import TestClient

from flows.web.app import WebSettings, create_app
from flows.web.callers import COOKIE, Sessions, caller_of
from flows.web.errors import hide_paths
from flows.web.limits import RequestLimit
from flows.web.security import Guard, GuardSettings
from flows.web.server import Listening, _Protocol, open_socket
from flows.web.tokens import Tokens, add_token, read_tokens, remove_tokens
from lora_engine.serving.engine import PlainEngine
from registry.errors import IdentityError, Refused
from registry.home import Home
from registry.identity import Actor
from registry.policy.actors import acting_as, establish_actor, refusing_own_user
from registry.versions.deletion import withdraw
from registry.versions.promotion import history, promote
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.commands import loraline_here, say
from tests.flows.web.server import copy_home, write_tokens

ADDRESS = "http://127.0.0.1:8188"
BODY = {"prompt": "a ring", "steps": 1, "seed": 1}
EVIL = "http://evil.example"
_CONTENTS = {
    "application/json": b'{"prompt": "a"}',
    "text/plain": b'{"prompt": "a"}',
    "application/x-www-form-urlencoded": b"prompt=a",
    "multipart/form-data; boundary=x": b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\na\r\n'
    b"--x--",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("security") / "home")


@pytest.fixture(scope="module")
def service(home: Home) -> Iterator[ImageService]:
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    yield service
    service.close()


@pytest.fixture
def client(service: ImageService) -> Iterator[TestClient]:
    with TestClient(create_app(service), base_url=ADDRESS) as client:
        yield client


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.yaml"


@pytest.fixture
def guarded(service: ImageService, file: Path) -> Iterator[tuple[TestClient, str, str]]:
    """Yields a client of a server with tokens, and the tokens of ann (tenant lab) and ben (tenant shop)."""
    ann, ben = write_tokens(file, ("ann@example.com", "lab"), ("ben@example.com", "shop"))
    app = create_app(service, WebSettings(tokens=file, is_secure=True))

    @app.get("/studio/whoami")
    def whoami(request: Request) -> dict[str, str]:
        with closing(Versions(service.home)) as versions:
            return {"actor": str(establish_actor(versions)), "tenant": caller_of(request).tenant}

    @app.post("/studio/promote")
    def move() -> dict[str, int | None]:
        with closing(Versions(service.home)) as versions:
            return {"after": promote(versions, "zorb", 2, "trial", reason="a test").after}

    with TestClient(app, base_url="https://127.0.0.1:8188", follow_redirects=False) as client:
        yield client, ann, ben


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8188", "127.0.0.1.evil.example", "", "[::2]:8188", "10.0.0.1"]
)
@pytest.mark.parametrize("path", ["/v1/jobs", "/healthz", "/studio", "/openapi.json"])
def test_a_foreign_host_header_is_refused_everywhere(client: TestClient, host: str, path: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "InvalidHost")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8188", "localhost:1", "LOCALHOST", "[::1]:8188"])
def test_the_names_of_this_machine_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("content", _CONTENTS)
@pytest.mark.parametrize(
    "headers",
    [{"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:9999"}],
)
def test_a_page_of_another_site_reaches_no_route_with_any_content(
    client: TestClient, service: ImageService, content: str, headers: dict[str, str]
) -> None:
    before = len(service.jobs())
    for path in ("/v1/jobs", "/v1/images", "/login", "/studio/gradio_api/upload"):
        answer = client.post(path, content=_CONTENTS[content], headers={**headers, "Content-Type": content})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "Forbidden")
    assert len(service.jobs()) == before


def test_a_page_of_this_server_and_a_followed_link_are_answered(client: TestClient) -> None:
    own = {"Origin": ADDRESS, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/jobs", json=BODY, headers=own).status_code == 202
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/healthz", headers=link).status_code == 200
    assert client.post("/v1/jobs", json=BODY, headers=link).status_code == 403


def test_a_preflight_of_another_site_allows_nothing(client: TestClient) -> None:
    answer = client.options("/v1/jobs", headers={"Origin": EVIL, "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/jobs/nothing", "/nothing", "/login"])
def test_every_answer_has_the_security_headers(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "same-origin", "own forms are sent with an Origin"
    refused = client.get(path, headers={"Host": "evil.example"}).headers
    assert "frame-ancestors 'none'" in refused["content-security-policy"]


def test_a_body_that_is_too_large_is_refused_by_its_length_and_while_it_arrives(service: ImageService) -> None:
    with TestClient(create_app(service, WebSettings(max_body=1000)), base_url=ADDRESS) as client:
        assert client.post("/v1/jobs", json=BODY).status_code == 202
        declared = client.post("/v1/jobs", content=b"x" * 1001)
        assert (declared.status_code, declared.json()["error"]["allowed"]) == (413, "at most 1,000 bytes")
        streamed = client.post("/v1/jobs", content=(b"x" * 100 for _ in range(11)))
        assert streamed.status_code == 413
        for length in ("-1", "1e9", "9" * 40):
            assert client.post("/v1/jobs", content=b"{}", headers={"Content-Length": length}).status_code == 413


def test_a_body_that_does_not_arrive_ends_with_a_timeout() -> None:
    sent: list[dict[str, object]] = []

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("the application must not see it")

    async def receive() -> dict[str, object]:
        await asyncio.sleep(3600)
        return {}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    guard = Guard(app, GuardSettings(("127.0.0.1",), 1000, 0.01, 0))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": [(b"host", b"127.0.0.1")]}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_a_connection_that_sends_no_headers_is_closed(service: ImageService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.web.server._HEADER_SECONDS", 0.2)

    async def converse() -> tuple[bytes, bytes]:
        with open_socket(Listening(port=0)) as sock:
            server = uvicorn.Server(uvicorn.Config(create_app(service), http=_Protocol, ws="none", log_config=None))
            serving = asyncio.create_task(server._serve([sock]))
            host, port = sock.getsockname()
            answers = []
            for begin in (b"POST /v1/jobs HTTP/1.1\r\nHost: 127", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(begin)
                answers.append(await asyncio.wait_for(reader.read(100), 60))
                writer.close()
            server.should_exit = True
            await serving
        return answers[0], answers[1]

    silent, complete = asyncio.run(converse())
    assert silent == b""
    assert complete.startswith(b"HTTP/1.1 200")


def test_requests_of_a_tenant_are_bounded_over_time() -> None:
    seconds = [0.0]
    limit = RequestLimit(60, lambda: seconds[0])
    assert [limit.admit("ann") for _ in range(60)] == [0] * 60
    assert limit.admit("ann") == 1
    assert limit.admit("ben") == 0
    seconds[0] = 1.0
    assert [limit.admit("ann"), limit.admit("ann")] == [0, 1]
    assert {RequestLimit(0).admit("ann") for _ in range(10_000)} == {0}


def test_too_many_requests_say_when_to_try_again(service: ImageService) -> None:
    with TestClient(create_app(service, WebSettings(requests_per_minute=3)), base_url=ADDRESS) as client:
        answers = [client.get("/v1/jobs") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200


def test_a_server_with_tokens_answers_nobody_else(guarded: tuple[TestClient, str, str]) -> None:
    client, ann, _ = guarded
    for headers in ({}, bearer("x"), bearer(""), bearer(ann[:-1]), {"Authorization": ann}, {"Cookie": f"{COOKIE}=x"}):
        for path in ("/v1/jobs", "/v1/adapters", "/metrics", "/openapi.json", "/studio/whoami"):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401, (path, headers)
            assert "Bearer" in answer.headers["www-authenticate"]
    assert client.get("/healthz").status_code == 200
    assert client.get("/v1/jobs", headers=bearer(ann)).status_code == 200
    basic = base64.b64encode(f"anyone:{ann}".encode()).decode()
    assert client.get("/v1/jobs", headers={"Authorization": f"Basic {basic}"}).status_code == 200


def test_the_root_leads_to_the_studio_or_to_the_document(guarded: tuple[TestClient, str, str]) -> None:
    assert guarded[0].get("/").headers["location"] == "/openapi.json"


def test_a_tenant_sees_no_job_of_another(guarded: tuple[TestClient, str, str]) -> None:
    client, ann, ben = guarded
    job = client.post("/v1/jobs", json=BODY, headers=bearer(ann)).json()
    for path in ("", "/images/0", "/preview", "/events"):
        assert client.get(f"/v1/jobs/{job['id']}{path}", headers=bearer(ben)).status_code == 404
    assert client.delete(f"/v1/jobs/{job['id']}", headers=bearer(ben)).status_code == 404
    assert client.get("/v1/jobs", headers=bearer(ben)).json() == []
    assert client.get(f"/v1/jobs/{job['id']}", headers=bearer(ann)).json()["id"] == job["id"]


def test_a_token_counts_until_it_is_removed_or_expires(guarded: tuple[TestClient, str, str], file: Path) -> None:
    client, ann, ben = guarded
    short, _ = add_token(file, "carl@example.com", "lab", 0.0)
    assert client.get("/v1/jobs", headers=bearer(short)).status_code == 401
    assert client.get("/v1/jobs", headers=bearer(ben)).status_code == 200
    assert remove_tokens(file, "ben@example.com") == 1
    assert client.get("/v1/jobs", headers=bearer(ben)).status_code == 401
    file.write_text("tokens: [")
    assert client.get("/v1/jobs", headers=bearer(ann)).status_code != 200
    assert client.get("/v1/jobs", headers=bearer(ann)).status_code == 401, "a file that cannot be read admits nobody"


def test_the_file_has_digests_only_and_only_its_owner_reads_it(file: Path) -> None:
    (token,) = write_tokens(file, ("ann@example.com", "lab"))
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert Tokens(file).find(token) == read_tokens(file)[0]


def sign_in(client: TestClient, token: str) -> str:
    answer = client.post("/login", data={"token": token}, headers={"Origin": "https://127.0.0.1:8188"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/studio")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Secure"} <= set(cookie.split("; "))
    assert token not in cookie
    client.cookies.clear()
    return cookie.partition(";")[0]


def test_a_browser_signs_in_with_a_token_and_acts_as_its_user(
    guarded: tuple[TestClient, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, ann, _ = guarded
    monkeypatch.setenv("LORALINE_ACTOR", "the-server")
    browser = {"Accept": "text/html"}
    assert client.get("/studio", headers=browser).headers["location"] == "/login"
    assert client.post("/login", data={"token": "wrong"}).status_code == 401
    cookie = sign_in(client, ann)
    who = client.get("/studio/whoami", headers={"Cookie": cookie}).json()
    assert who == {"actor": "ann@example.com", "tenant": "lab"}
    assert client.get("/v1/jobs", headers={"Cookie": cookie}).status_code == 401, "cookies are for pages"

    own = {"Cookie": cookie, "Origin": "https://127.0.0.1:8188"}
    form = re.search(r'name="form" type="hidden" value="([0-9a-f]{64})"', client.get("/logout", headers=own).text)
    assert form is not None
    assert client.post("/logout", data={"form": "x"}, headers=own).status_code == 403
    assert client.get("/studio/whoami", headers={"Cookie": cookie}).status_code == 200
    assert client.post("/logout", data={"form": form[1]}, headers=own).status_code == 303
    assert client.get("/studio/whoami", headers={"Cookie": cookie}).status_code == 401


def test_a_signed_in_browser_changes_nothing_for_a_page_of_another_site(guarded: tuple[TestClient, str, str]) -> None:
    client, ann, _ = guarded
    cookie = sign_in(client, ann)
    for headers in ({}, {"Origin": EVIL}, {"Origin": "null"}):
        assert client.post("/studio/promote", headers={"Cookie": cookie, **headers}).status_code == 403
    own = {"Cookie": cookie, "Origin": "https://127.0.0.1:8188"}
    assert client.post("/studio/promote", headers=own).json() == {"after": 2}


def test_roles_apply_to_the_signed_in_user_and_the_log_names_it(
    guarded: tuple[TestClient, str, str], home: Home
) -> None:
    client, ann, ben = guarded
    policy = home.path / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before + "roles: {releaser: {may: [stage], members: [ann@example.com]}}\n")
    try:
        refused = client.post("/studio/promote", headers=bearer(ben))
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "Refused")
        assert "ben@example.com has no role" in refused.json()["error"]["reasons"][0]
        assert client.post("/studio/promote", headers=bearer(ann)).status_code == 200
    finally:
        policy.write_text(before)
    with closing(Versions(home)) as versions:
        *_, refusal = (event for event in history(versions, "zorb") if event.action == "refuse")
    assert (refusal.actor, refusal.details["actor"]["established"]) == ("ben@example.com", "token")


def test_a_server_with_tokens_never_acts_as_its_own_user(home: Home) -> None:
    with closing(Versions(home)) as versions:
        with refusing_own_user("loraline serve"):
            with pytest.raises(IdentityError, match="no user is signed in"):
                establish_actor(versions)
            with acting_as(Actor("ann@example.com", "token")):
                assert establish_actor(versions) == "ann@example.com"
                assert _in_thread(lambda: establish_actor(versions)) == "IdentityError"
            with pytest.raises(IdentityError):
                withdraw(versions, "zorb", 2, reason="nobody")
        assert establish_actor(versions).established in {"os", "declared"}


def test_a_policy_can_refuse_users_of_tokens(home: Home) -> None:
    policy = home.path / "policy.yaml"
    before = policy.read_text()
    policy.write_text(before + "identity: {accept: [os, oidc, signed]}\n")
    try:
        with closing(Versions(home)) as versions, pytest.raises(Refused, match="known by a token of a server"):
            promote(versions, "zorb", 2, "trial2", reason="a test", actor=Actor("ann@example.com", "token"))
    finally:
        policy.write_text(before)


def _in_thread(work: object) -> str:
    result: list[str] = []

    def run() -> None:
        try:
            result.append(str(work()))  # type: ignore[operator]
        except IdentityError as error:
            result.append(type(error).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def test_sessions_are_bounded_and_end_with_their_token(file: Path) -> None:
    (token,) = write_tokens(file, ("ann@example.com", "lab"))
    tokens = Tokens(file)
    sessions = Sessions(tokens)
    entry = tokens.find(token)
    assert entry is not None
    first = sessions.open(entry)
    assert sessions.find(first) == entry
    assert not sessions.is_form_token("other", sessions.form_token(first))
    for _ in range(1000):
        last = sessions.open(entry)
    assert sessions.find(first) is None
    remove_tokens(file, "ann@example.com")
    assert sessions.find(last) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/home/serving/jobs.db: the disk is full", "jobs.db: the disk is full"),
        ("cannot read '/tmp/tmpab12/image'", "cannot read 'image'"),
        ("see https://example.com/a/b", "see https://example.com/a/b"),
        ("zorb@3: 1/2 of 3/4", "zorb@3: 1/2 of 3/4"),
    ],
)
def test_an_error_shows_no_folder_of_the_machine(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


def test_an_unexpected_error_shows_nothing_of_its_text(service: ImageService, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(service)

    @app.get("/broken")
    def broken() -> None:
        raise ValueError("secret in /etc/passwd")

    with TestClient(app, base_url=ADDRESS) as client:
        answer = client.get("/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "passwd" not in answer.text
    assert "secret in /etc/passwd" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_tokens_are_made_listed_and_removed_on_the_command_line(tmp_path: Path) -> None:
    file, home = tmp_path / "tokens.yaml", tmp_path / "home"
    token = say(
        "token", "new", "ann@example.com", "--file", file, "--tenant", "lab", "--expires", "30d", home=home
    ).strip()
    entry = Tokens(file).find(token)
    assert entry is not None
    assert (entry.user, entry.tenant) == ("ann@example.com", "lab")
    assert "ann@example.com" in say("token", "list", "--file", file, home=home)
    assert '"valid": true' in say("token", "list", "--file", file, "--json", home=home)
    assert "removed 1" in say("token", "remove", "ann@example.com", "--file", file, home=home)
    assert Tokens(file).find(token) is None
    for line in (
        ("token", "remove", "ann@example.com", "--file", file),
        ("token", "new", "ann", "--file", file, "--tenant", "../lab"),
        ("token", "new", " ", "--file", file),
    ):
        completed = loraline_here(*line, home=home)
        assert completed.returncode in {1, 2}
        assert "loraline: " in completed.stderr
    assert not home.exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tokens: [{sha256: x, user: a, tenant: b}]", "tokens.0.sha256"),
        (f"tokens: [{{sha256: {'a' * 64}, user: a, tenant: B}}]", "tokens.0.tenant"),
        (f"tokens: [{{sha256: {'a' * 64}, user: a, tenant: b, expires: '2026-01-01T00:00:00'}}]", "no time zone"),
        (f"tokens: [{{sha256: {'a' * 64}, user: a, tenant: b, role: admin}}]", "tokens.0.role"),
        ("- a", "a mapping with the key tokens"),
        ("tokens: [", "tokens.yaml:1"),
    ],
)
def test_a_file_of_tokens_that_cannot_be_used_is_refused_with_its_line(file: Path, text: str, match: str) -> None:
    file.write_text(text)
    with pytest.raises(SpecError, match=match):
        Tokens(file)


@pytest.fixture(scope="module")
def idle_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a home that nobody serves."""
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("idle") / "home")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--host", "0.0.0.0"], "reachable from other machines"),
        (["--host", "0.0.0.0", "--tokens", "FILE"], "unencrypted"),
        (["--host", "0.0.0.0", "--tokens", "FILE", "--behind-proxy"], "no name that a browser sends"),
        (["--tls-certificate", "FILE"], "TLS needs two files"),
        (["--tokens", "MISSING"], "cannot read the file"),
        (["--safety", "nothing"], "no safety hook"),
        (["--engine", "static", "--adapter", "zorb@9"], "no version '9'"),
        (["--base", "no-such-base"], "no-such-base"),
        (["--keep", "soon"], "invalid time"),
    ],
)
def test_a_server_that_would_be_open_or_cannot_work_does_not_start(
    idle_home: Home, file: Path, options: list[str], match: str
) -> None:
    write_tokens(file, ("ann@example.com", "lab"))
    folder = idle_home.path
    line = [str(file) if option == "FILE" else option for option in options]
    completed = loraline_here("serve", "--port", "0", "--no-studio", *line, home=folder)
    assert completed.returncode in {1, 2}, completed.stderr
    assert match in completed.stderr
    assert completed.stdout == ""
