"""What vLLM's endpoints make of a request's options: a path and a body in, what is wrong with the
options out.
"""

import json
import re
import reprlib
from typing import Any

import msgspec

from vllm_toptheta.requests import EXAMPLE, PREFIX, RequestPolicy

_XARGS = ("vllm_xargs",)
_SAMPLING = ("sampling_params", "extra_args")

PLACES: dict[str, tuple[str, ...] | None] = {
    "/v1/chat/completions": _XARGS,
    "/v1/chat/completions/batch": _XARGS,
    "/v1/completions": _XARGS,
    "/v1/responses": _XARGS,
    "/v1/messages": _XARGS,
    "/invocations": _XARGS,
    "/inference/v1/generate": _SAMPLING,
    "/cohere/v2/chat": None,
    "/generative_scoring": None,
    "/v1/systemone": None,
}
"""Where the bodies of endpoints that generate hold options; None where they have no place for them,
so that such requests run as the server does."""

SHOWING = frozenset(path for path, place in PLACES.items() if place == _XARGS)
"""Endpoints whose responses carry what was pruned."""

OPEN = frozenset({"/invocations", "/generative_scoring"})
"""Endpoints that vLLM answers without a key, whatever the server's keys are."""

_EXAMPLES = {
    _XARGS: EXAMPLE,
    _SAMPLING: '"sampling_params": {"extra_args": {"toptheta_min_prob": 0.002}}',
}
_READ = {_XARGS[0], _SAMPLING[0], "use_beam_search"}
_ESCAPED = re.compile(rb"\\u00(?:74|6[fF158]|70|5[fF])")


def may_name_options(body: bytes) -> bool:
    """Whether a body may have option names in it, however JSON spells them."""
    # UTF-16 and UTF-32 are JSON as well. Bytes are found several times as fast as a pattern.
    return (
        PREFIX.encode() in body
        or (b"\\" in body and b"\\u00" in body and _ESCAPED.search(body) is not None)
        or b"\0" in body[:4]
    )


def problem_of(path: str, body: bytes, policy: RequestPolicy) -> str | None:
    """What is wrong with the options in a body; None where nothing is, or vLLM is to say it.

    Args:
        path: one of PLACES.
        body: of the request.
        policy: what requests may ask for.
    """
    try:
        request = _fields_of(body)
    except (ValueError, RecursionError):  # RecursionError: brackets a hundred thousand deep
        return None
    if not isinstance(request, dict):
        return None
    place = PLACES[path]
    # vLLM ignores unknown fields, which would leave the client believing that it was heard.
    stray = [
        key
        for other in ((), _XARGS, _SAMPLING[:1], _SAMPLING)
        if other != place
        for key in _at(request, other)
        if key.startswith(PREFIX)
    ]
    if stray:
        shown = ", ".join(map(reprlib.repr, sorted(stray)[:3]))
        if place is None:
            return (
                f"{path} takes no options, got {shown}: leave them out, or ask /v1/chat/completions"
            )
        return f"{shown} must stand inside of {'.'.join(place)}: {_EXAMPLES[place]}"
    if place is None:
        return None
    options = _at(request, place)
    if request.get("use_beam_search") and any(key.startswith(PREFIX) for key in options):
        return (
            "beam search takes no options, it runs as the server does: leave them out, or ask "
            'without "use_beam_search"'
        )
    try:
        policy.check(options)
    except ValueError as error:
        return str(error)
    return None


def _fields_of(body: bytes) -> Any:
    """A body of which only fields with options in them are read: the others, which may hold
    megabytes of prompts, are None."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):  # NaN, UTF-16 and the like, which vLLM takes
        return json.loads(body)
    return {name: json.loads(bytes(raw)) if name in _READ else None for name, raw in fields.items()}


def _at(request: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """The object at a place of a body; empty where there is none."""
    found: Any = request
    for name in place:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}
