"""No password of a URL is left in a text, and what is no password stays."""

from collections.abc import Callable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from lightning_moe.config.yaml_text import redacted_yaml
from lightning_moe.errors import UserError
from lightning_moe.redaction import is_redacted, redact, redact_all


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://me:s3cret@host:5000/x", "http://me:***@host:5000/x"),
        ("postgresql://me:Ab/cD9x@127.0.0.1:9/m", "postgresql://me:***@127.0.0.1:9/m"),
        ("postgresql+psycopg://me:p@ss:w/rd@host/m", "postgresql+psycopg://me:***@host/m"),
        ("postgresql://me:my pass@host/m", "postgresql://me:***@host/m"),
        ("redis://:s3cret@host", "redis://:***@host"),
        ("https://ghp_s3cret@host/x.git", "https://***@host/x.git"),
        ("postgresql://host/m?user=me&password=s3cret", "postgresql://host/m?user=me&password=***"),
        (
            "postgresql://host/m?sslpassword=s3cret&sslmode=require",
            "postgresql://host/m?sslpassword=***&sslmode=require",
        ),
        ("https://host/blob?sv=1&sig=s3cret%3D&x=1", "https://host/blob?sv=1&sig=***&x=1"),
        ("https://host/x?X-Amz-Signature=s3cret", "https://host/x?X-Amz-Signature=***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Ds3cret", "mssql+pyodbc:///?odbc_connect=***"),
        ("FATAL: dbname=m user=me password='s3 cret' host=h", "FATAL: dbname=m user=me password=*** host=h"),
        ("failed with url: /api/x?token=s3cret (Caused by …)", "failed with url: /api/x?token=*** (Caused by …)"),
        (
            "API request to 'http://me:s3cret@h:9/api' failed: proxy http://you:s3cret@p:3128",
            "API request to 'http://me:***@h:9/api' failed: proxy http://you:***@p:3128",
        ),
        ("HTTP_PROXY=http://a:s3cret@b,http://c:s3cret@d", "HTTP_PROXY=http://a:***@b,http://c:***@d"),
        ("tracking_uri: mysql://me:s3/cret@h/m\nseed: 1", "tracking_uri: mysql://me:***@h/m\nseed: 1"),
    ],
)
def test_passwords_are_taken_out(text: str, redacted: str) -> None:
    assert redact(text) == redacted
    assert redact(redacted) == redacted
    assert is_redacted(redacted)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1?user=a@b",
        "http://[::1]:5000",
        "postgresql://me@host/database",
        "sqlite:////home/me@work/mlflow.db",
        "hf://datasets/name@revision/file.parquet",
        "mail me@host: see https://docs.python.org/3/library/glob.html",
        "run_name: a:b@c",
        "data.max_tokens=5",
    ],
)
def test_what_is_no_password_stays(text: str) -> None:
    assert redact(text) == text
    assert not is_redacted(text)


@pytest.mark.parametrize("around", [str, "could not connect to {!r} (timeout)".format, "uri: {}\nnext: 1".format])
@given(password=st.text("Aä9/:@%+?#&=.-", min_size=1).filter(lambda text: "@" not in text))
def test_no_password_that_a_database_gets_is_left(around: Callable[[str], str], password: str) -> None:
    """SQLAlchemy decides what the password is."""
    url = f"postgresql://me:Secret{password}@host:5432/m"
    assert make_url(url).password is not None
    assert "Secret" not in redact(around(url))


def test_plain_data_is_redacted_inside() -> None:
    data = {"tracking": {"tracking_uri": "http://me:pw@h"}, "list": ["http://me:pw@h", 1, None], "n": 1.5}
    assert redact_all(data) == {
        "tracking": {"tracking_uri": "http://me:***@h"},
        "list": ["http://me:***@h", 1, None],
        "n": 1.5,
    }


def test_messages_of_errors_have_no_password() -> None:
    assert str(UserError("tracking_uri=http://me:s3cret@h: no")) == "tracking_uri=http://me:***@h: no"


def test_yaml_keeps_its_text_unless_it_has_a_password() -> None:
    plain = "# who wrote it\nurl: http://h  # the server\n"
    assert redacted_yaml(plain) == plain
    text = "# who wrote it\ntracking: {tracking_uri: 'postgresql://me:my pass/word@h/m'}\nseed: 1\n"
    assert redacted_yaml(text).startswith("# who wrote it\n")
    assert yaml.safe_load(redacted_yaml(text)) == {"tracking": {"tracking_uri": "postgresql://me:***@h/m"}, "seed": 1}
