"""Secrets are replaced in URLs, well formed or not, and in texts; everything else stays as it is."""

import pytest

from registry.store.redaction import redact, redact_url, redact_values, secrets_of

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
