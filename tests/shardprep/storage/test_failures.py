"""Which failures of a store may pass: those of the store, and not those of the user."""

from __future__ import annotations

import pytest

from shardprep.storage.failures import may_pass


def translated(status: int, code: str = "") -> OSError:
    """The error that s3fs raises for an answer."""
    error, cause = OSError(code), Exception(code)
    cause.response = {  # type: ignore[attr-defined]
        "ResponseMetadata": {"HTTPStatusCode": status},
        "Error": {"Code": code},
    }
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (translated(503, "SlowDown"), True),
        (translated(429), True),
        (translated(400, "RequestTimeout"), True),
        (translated(403, "RequestTimeTooSkewed"), True),
        (translated(301, "PermanentRedirect"), False),
        (translated(400, "InvalidBucketName"), False),
        (type("ParamValidationError", (Exception,), {})(), False),
        (type("NoRegionError", (Exception,), {})(), False),
        (type("EndpointConnectionError", (Exception,), {})(), True),
    ],
    ids=str,
)
def test_mistakes_of_the_user_do_not_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes
