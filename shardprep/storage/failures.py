"""Why a call to a store failed, and whether another try may succeed."""

from __future__ import annotations

from typing import Any

from shardprep.errors import StorageError

# Errors that waiting does not change: files, permissions, and mistakes of a program.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ImportError,
    MemoryError,
    StorageError,
)
# The same of botocore, which need not be installed.
_FINAL_NAMES = {
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
# Answers that refuse (status 4xx), but that a later try need not get; and the codes of S3's
# answers of status 400 with the same meaning.
_PASSING_STATUS = (408, 425, 429)
_PASSING_CODES = {"RequestTimeout", "RequestTimeTooSkewed", "XAmzContentSHA256Mismatch"}

AFTER_THE_END, ABSENT = 416, (404, 410)
"""HTTP status of a range that begins after the end of the file, and of a file that is absent."""


def may_pass(error: BaseException) -> bool:
    """Whether a call that failed with this error may succeed later."""
    if isinstance(error, _FINAL) or not isinstance(error, Exception):
        return False
    status = http_status(error)
    if isinstance(status, int) and 300 <= status < 500:
        code = _answer(error).get("Error", {}).get("Code")
        return status in _PASSING_STATUS or code in _PASSING_CODES
    return type(error).__name__ not in _FINAL_NAMES


def http_status(error: BaseException | None) -> int | None:
    """HTTP status of the answer behind an error of aiohttp or botocore; None if unknown."""
    said = getattr(error, "status", None)
    status: int | None = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", said)
    return status


def in_words(error: BaseException | None) -> str:
    """An error's type and message, in a line of limited length."""
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")


def _answer(error: BaseException | None) -> dict[str, Any]:
    """S3's answer behind an error, which botocore keeps in the error's cause; else empty."""
    answer = getattr(error and error.__cause__, "response", None)
    return answer if isinstance(answer, dict) else {}
