"""Options of one request: what is accepted, what every wrong one is told, and the cache salts."""

import itertools
from typing import Any

import pytest

from vllm_toptheta.request_options import RequestOptions, RequestPolicy, TargetK, cache_salt


def policy_of(decode: float | None, prefill: float | None, **bounds: Any) -> RequestPolicy:
    return RequestPolicy(
        TargetK(decode, prefill), **{"min_k": 16, "max_k": 512, "allow_off": True, **bounds}
    )


POLICY = policy_of(128, None)


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
    policy = policy_of(128, None, allow_off=False)
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


SERVERS = [
    pytest.param(policy_of(128, None), id="decode"),
    pytest.param(policy_of(None, 80), id="prefill"),
    pytest.param(policy_of(None, 128), id="prefill-same-k"),
    pytest.param(policy_of(128, 80), id="both"),
    pytest.param(policy_of(128, 128), id="both-same-k"),
]


@pytest.mark.parametrize("policy", SERVERS)
def test_requests_share_kv_exactly_where_no_row_of_theirs_keeps_other_keys(
    policy: RequestPolicy,
) -> None:
    requests: list[dict[str, Any]] = [{"toptheta_k": k} for k in (64, 80, 128)]
    requests += [{}, {"toptheta": "off"}, {"toptheta": "on", "toptheta_layers": True}]
    rows, salts = [], []
    for xargs in requests:
        # The worker reads the options as they were sent.
        rows.append(policy.server.of(RequestOptions.parse(xargs)))
        salts.append(cache_salt(policy.check(xargs), "mine"))
    for first, second in itertools.combinations(range(len(requests)), 2):
        assert (salts[first] == salts[second]) == (rows[first] == rows[second]), (
            requests[first],
            requests[second],
        )


@pytest.mark.parametrize(
    ("policy", "own", "other"),
    [
        (policy_of(128, None), 128, 80),
        (policy_of(None, 80), 80, 128),
        (policy_of(128, 128), 128, 80),
    ],
)
def test_naming_what_the_server_does_changes_nothing(
    policy: RequestPolicy, own: float, other: float
) -> None:
    assert policy.check({"toptheta_k": own}) == RequestOptions()
    assert policy.check({"toptheta_k": other}) == RequestOptions(k=other)


def test_no_k_is_the_servers_own_where_its_phases_differ() -> None:
    for k in (80, 128):
        assert policy_of(128, 80).check({"toptheta_k": k}) == RequestOptions(k=k)


def test_bounds_hold_for_whatever_is_not_the_servers_own() -> None:
    bounds = {"min_k": 90, "max_k": 100}
    policy_of(128, None, **bounds).check({"toptheta_k": 128})
    policy_of(None, 80, **bounds).check({"toptheta_k": 80})
    for server in ((128, 80), (None, 80)):
        with pytest.raises(ValueError, match="between 90 and 100"):
            # Its prompt would keep more than the operator allows.
            policy_of(*server, **bounds).check({"toptheta_k": 128})


@pytest.mark.parametrize(
    ("server", "xargs", "expected"),
    [
        ((128, None), {}, (128, None)),
        ((128, None), {"toptheta_k": 64}, (64, None)),
        ((None, 80), {}, (None, 80)),
        ((None, 80), {"toptheta_k": 64}, (None, 64)),
        ((128, 80), {"toptheta_k": 64}, (64, 64)),
        ((128, 80), {"toptheta": "off"}, (None, None)),
    ],
)
def test_a_requests_k_holds_wherever_the_server_prunes(
    server: tuple[float | None, float | None],
    xargs: dict[str, Any],
    expected: tuple[float | None, float | None],
) -> None:
    assert TargetK(*server).of(RequestOptions.parse(xargs)) == TargetK(*expected)
