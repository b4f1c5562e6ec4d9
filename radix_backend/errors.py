"""The errors a user can meet. Each maps to one Triton error code and one HTTP status."""

from __future__ import annotations

from typing import ClassVar


class RadixError(Exception):
    """Base of all typed errors; itself an unexpected failure of ours."""

    code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500


class InvalidArgument(RadixError):
    """The request or a setting is wrong. The message names the field, the value and what is accepted."""

    code = "INVALID_ARG"
    http_status = 400


class NotFound(RadixError):
    """Something named by the user does not exist."""

    code = "NOT_FOUND"
    http_status = 404


class Unsupported(RadixError):
    """A valid wish that this version cannot fulfil."""

    code = "UNSUPPORTED"
    http_status = 400


class Cancelled(RadixError):
    """The client cancelled the request or went away."""

    code = "CANCELLED"
    http_status = 499


class Unavailable(RadixError):
    """The engine is loading, overloaded, restarting or gone; the same request may succeed later."""

    code = "UNAVAILABLE"
    http_status = 503


_BY_CODE = {cls.code: cls for cls in (RadixError, InvalidArgument, NotFound, Unsupported, Cancelled, Unavailable)}

CODES = tuple(_BY_CODE)


def from_code(code: str, message: str) -> RadixError:
    """The error that travelled as ``(code, message)`` in a protocol message."""
    return _BY_CODE.get(code, RadixError)(message)


def call_it_prompt(message: str) -> str:
    """An error's message for doors at which a prompt of either kind is one thing: the gateway uses Triton's names."""
    for names in ("'text_input', 'input_ids'", "'text_input'", "'input_ids'"):
        message = message.replace(names, "'prompt'")
    return message
