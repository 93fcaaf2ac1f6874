"""Secrets are replaced in URLs, well formed or not, and in texts; everything else stays as it is."""

import pytest

from lora_engine.errors import DataError
from registry.errors import Refused
from registry.store.redaction import redact, redact_error, redact_url, redact_values, secrets_of

URLS = {
    "postgresql://ada:pw@host:5432/db": "postgresql://ada:***@host:5432/db",
    "postgresql://ada:p@w/x y@host/db": "postgresql://ada:***@host/db",
    "postgresql://host/db?user=ada&password=pw&sslmode=require": "postgresql://host/db?user=ada&password=***&sslmode=require",
    "https://token@host/x": "https://***@host/x",
    "https://host/x?X-Amz-Signature=pw&a=b": "https://host/x?X-Amz-Signature=***&a=b",
    "git+ssh://git@host/x": "git+ssh://git@host/x",
    "s3://id:pw@bucket/x": "s3://***@bucket/x",
    "ada:pw@host/db": "***@host/db",
    "https://host/hf_abcdefghijklmnop": "https://host/***",
}
PLAIN = (
    "s3://bucket/folder",
    "postgresql://ada@host/db",
    "sqlite:////srv/ada@lab/x:y@z/lineage.db",
    "/srv/ada:x@lab/store",
    "file:///srv/ada@lab/store",
    "http://127.0.0.1:4200/api",
    "https://host/models/zorb@3",
)


@pytest.mark.parametrize("url", [*URLS, *PLAIN])
def test_url_is_shown_without_its_secrets_and_otherwise_unchanged(url):
    shown = URLS.get(url, url)
    assert redact_url(url) == shown
    assert redact_url(shown) == shown
    assert redact(f"cannot open {url!r}", url) == f"cannot open {shown!r}"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at https://ada:pw@host/x: refused", "at https://***@host/x: refused"),
        ("see http://host:8080/x@y", "see http://host:8080/x@y"),
        ("invalid dsn 'password=pw host=x'", "invalid dsn 'password=*** host=x'"),
        ("hf_token: 'pw', x", "hf_token: '***', x"),
        ("ghp_abcdefghijklmnopqrst is no token", "*** is no token"),
        ("the token 'sks' and 12 tokens", "the token 'sks' and 12 tokens"),
        ("key: value, rank=8", "key: value, rank=8"),
        ("keys: unet.x@y", "keys: unet.x@y"),
    ],
)
def test_text_is_shown_without_its_secrets_and_otherwise_unchanged(text, redacted):
    assert redact(text) == redacted
    assert redact_values({"a": [text, 1, None], "b": (text,)}) == {"a": [redacted, 1, None], "b": [redacted]}


def test_secret_of_a_url_is_found_where_a_message_quotes_it_alone_or_decoded():
    url = "ftp://ada:p%40ss@host/x"
    assert secrets_of(url) == {"p%40ss", "p@ss"}
    assert redact("530 p@ss is wrong; p%40ss too; p@ssable is not", url) == "530 *** is wrong; *** too; p@ssable is not"


def test_value_of_a_secret_variable_is_replaced_in_messages_but_not_in_values(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "watercolor")
    monkeypatch.setenv("SHORT_TOKEN", "short")
    assert redact("watercolor short watercolors") == "*** short watercolors"
    assert redact_values(["a watercolor"]) == ["a watercolor"]


def test_the_current_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/projects/work")
    monkeypatch.setenv("OLDPWD", "/projects/other")
    monkeypatch.setenv("STORE_PWD", "watercolor")
    assert redact("/projects/work/x /projects/other/y watercolor") == "/projects/work/x /projects/other/y ***"


def test_value_under_the_name_of_a_secret_is_replaced_whatever_its_form():
    values = {"hf_token": "plain", "WANDB_API_KEY": 7, "db": [{"password": "x", "user": "ada"}], "secret": None}
    hidden = {"hf_token": "***", "WANDB_API_KEY": "***", "db": [{"password": "***", "user": "ada"}], "secret": None}
    assert redact_values(values) == hidden
    kept = {"token": "sks", "key": "a0", "tokens": ["sks"], "keys": "unet", "token_length": 77}
    assert redact_values(kept) == kept


@pytest.mark.parametrize(
    "error",
    [
        ValueError("cannot open https://ada:pw@host/x", 7),
        OSError(2, "no route to https://ada:pw@host/x", "https://ada:pw@host/x"),
        DataError("no image", where="https://ada:pw@host/x", remedy="see https://ada:pw@host/x"),
        Refused("it cannot move", reasons=("https://ada:pw@host/x is gone",)),
    ],
)
def test_errors_and_their_causes_are_raised_without_secrets_and_in_their_class(error):
    kind, cause = type(error), KeyError("password=pw")
    error.__cause__ = cause
    redact_error(error)
    assert type(error) is kind
    assert "pw" not in f"{error} {error!r} {vars(error)} {getattr(error, 'filename', '')} {cause}"
    assert "***" in str(error)
    assert "***" in str(cause)


def test_a_registered_version_has_no_secret_in_mlflow_or_the_database(synced, register):
    """Every file of the home is searched: MLflow's tags, parameters, descriptions and documents, and all rows."""
    url = "https://ada:hunter2@host/x?token=hunter2q"
    card = {"title": f"from {url}", "trigger": "hf_hunter2abcdefghijkl", "base": f"{url}/hf_hunter2abcdefghijkl"}
    params = {"base": url, "hub": {"hf_token": "hunter2x"}, "long": f"{url} " * 900}
    version = register(synced, b"weights", card=card | {"license": "MIT"}, params=params)
    files = [path for path in synced.home.path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
    assert version.params["hub"] == {"hf_token": "***"}
    assert version.card["title"] == "from https://***@host/x?token=***"
