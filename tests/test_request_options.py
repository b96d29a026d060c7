"""Options of one request: what is accepted, what every wrong one is told, and the cache salts."""

import itertools
from typing import Any

import pytest

from vllm_toptheta.request_options import RequestOptions, RequestPolicy, cache_salt

POLICY = RequestPolicy(default_k=128, min_k=16, max_k=512, allow_off=True)


@pytest.mark.parametrize(
    ("xargs", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"other": 1, "session_id": "x"}, {}),
        ({"toptheta_k": 64}, {"k": 64}),
        ({"toptheta_k": 64.5, "toptheta_layers": True}, {"k": 64.5, "layers": True}),
        ({"toptheta_layers": 1}, {"layers": True}),
        ({"toptheta_layers": 0}, {}),
        ({"toptheta": "off"}, {"pruning": False}),
        ({"toptheta": False}, {"pruning": False}),
        ({"toptheta": 0}, {"pruning": False}),
        ({"toptheta": "on"}, {}),
        ({"toptheta_k": 128}, {}),
    ],
)
def test_accepted(xargs: Any, expected: dict[str, Any]) -> None:
    assert POLICY.check(xargs) == RequestOptions(**expected)


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"toptheta_kk": 1}, ["'toptheta_kk'", "did you mean 'toptheta_k'"]),
        ({"toptheta_layer": 1}, ["did you mean 'toptheta_layers'"]),
        ({"toptheta_k": "64"}, ["toptheta_k", "'64'"]),
        ({"toptheta_k": True}, ["positive number", "True"]),
        ({"toptheta_k": 0}, ["positive number"]),
        ({"toptheta_k": float("inf")}, ["positive number"]),
        ({"toptheta_k": float("nan")}, ["positive number"]),
        ({"toptheta_k": 15}, ["between 16 and 512"]),
        ({"toptheta_k": 513}, ["between 16 and 512"]),
        ({"toptheta": "no"}, ['"off" or "on"', "'no'"]),
        ({"toptheta": {"k": 3}}, ['"off" or "on"']),
        ({"toptheta_layers": "all"}, ["true or false", "'all'"]),
        ({"toptheta": "off", "toptheta_k": 64}, ["send one of both"]),
    ],
)
def test_wrong_options_are_told_what_to_send(xargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        POLICY.check(xargs)
    for word in words:
        assert word in str(caught.value)


def test_off_may_be_forbidden() -> None:
    policy = RequestPolicy(default_k=128, min_k=16, max_k=512, allow_off=False)
    with pytest.raises(ValueError, match="does not allow"):
        policy.check({"toptheta": "off"})


def test_salts_are_equal_exactly_where_settings_and_user_salts_are() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"toptheta": "off"},
        {"toptheta_k": 64},
        {"toptheta_k": 64.5},
    ]
    # The fourth is what the salt of another user looks like from inside.
    salts = [None, "mine", "toptheta:off:", "toptheta:off:mine"]
    seen = {}
    for xargs, salt in itertools.product(settings, salts):
        made = cache_salt(POLICY.check(xargs), salt)
        assert made not in seen, (xargs, salt, seen.get(made))
        seen[made] = (xargs, salt)
    assert cache_salt(POLICY.check({"toptheta_k": 64.0}), None) == cache_salt(
        POLICY.check({"toptheta_k": 64}), None
    )


def test_the_servers_own_settings_leave_the_users_salt_alone() -> None:
    for xargs in ({}, {"toptheta_k": 128}, {"toptheta_layers": True}):
        assert cache_salt(POLICY.check(xargs), None) is None
        assert cache_salt(POLICY.check(xargs), "mine") == "mine"
