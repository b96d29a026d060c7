"""Options of one request: what is accepted, what every wrong one is told, and the cache salts."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from vllm_toptheta.requests import (
    RequestOptions,
    RequestPolicy,
    Resolved,
    Target,
    Targets,
    cache_salt,
)

SERVER = Target(0.001, 0.5)
BY_K = Target(None, 0.0, 128)
PROMPTS = Target(0.01)
RANGES = {"min_prob": (1e-5, 0.1), "min_mass": (0.0, 0.9), "k": (16.0, 512.0)}


def policy_of(
    decode: Target | None,
    prefill: Target | None,
    *,
    table: bool = True,
    allow_off: bool = True,
    **bounds: tuple[float, float],
) -> RequestPolicy:
    ranges = {name: RANGES[name] for name in RANGES if table or name != "k"}
    return RequestPolicy(Targets(decode, prefill), {**ranges, **bounds}, allow_off)


POLICY = policy_of(SERVER, None)


@pytest.mark.parametrize(
    ("xargs", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"other": 1, "session_id": "x"}, {}),
        ({"toptheta_min_prob": 0.01}, {"min_prob": 0.01}),
        ({"toptheta_min_mass": 0.9}, {"min_mass": 0.9}),
        ({"toptheta_min_mass": 0}, {"min_mass": 0}),
        ({"toptheta_k": 64}, {"k": 64}),
        ({"toptheta_k": 64.5, "toptheta_layers": True}, {"k": 64.5, "layers": True}),
        ({"toptheta_k": 64, "toptheta_min_mass": 0.3}, {"k": 64, "min_mass": 0.3}),
        ({"toptheta_layers": 1}, {"layers": True}),
        ({"toptheta_layers": 0}, {}),
        ({"toptheta_report": False}, {"report": False}),
        ({"toptheta_report": 1, "toptheta": "off"}, {"report": True, "pruning": False}),
        ({"toptheta": "off"}, {"pruning": False}),
        ({"toptheta": False}, {"pruning": False}),
        ({"toptheta": 0}, {"pruning": False}),
        ({"toptheta": "on"}, {}),
        ({"toptheta_min_prob": 0.001}, {}),
        ({"toptheta_min_mass": 0.5}, {}),
        ({"toptheta_min_prob": 0.001, "toptheta_min_mass": 0.9}, {"min_mass": 0.9}),
    ],
)
def test_accepted(xargs: Any, expected: dict[str, Any]) -> None:
    assert POLICY.check(xargs) == RequestOptions(**expected)


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"toptheta_kk": 1}, ["'toptheta_kk'", "did you mean 'toptheta_k'"]),
        ({"toptheta_layer": 1}, ["did you mean 'toptheta_layers'"]),
        ({"toptheta_min_prop": 1}, ["did you mean 'toptheta_min_prob'"]),
        ({"toptheta_min_prob": "0.1"}, ["between 0 and 1", "'0.1'"]),
        ({"toptheta_min_prob": 0}, ["between 0 and 1"]),
        ({"toptheta_min_prob": 1}, ["between 0 and 1"]),
        ({"toptheta_min_prob": True}, ["between 0 and 1", "True"]),
        ({"toptheta_min_prob": float("nan")}, ["between 0 and 1"]),
        ({"toptheta_min_prob": 0.2}, ["toptheta_min_prob = 0.2", "between 1e-05 and 0.1"]),
        ({"toptheta_min_prob": 1e-6}, ["between 1e-05 and 0.1"]),
        ({"toptheta_min_mass": 1}, ["from 0 to below 1"]),
        ({"toptheta_min_mass": -0.1}, ["from 0 to below 1"]),
        ({"toptheta_min_mass": 0.95}, ["send a min_mass between 0 and 0.9"]),
        ({"toptheta_k": "64"}, ["toptheta_k", "'64'"]),
        ({"toptheta_k": True}, ["positive number", "True"]),
        ({"toptheta_k": 0}, ["positive number"]),
        ({"toptheta_k": float("inf")}, ["positive number"]),
        ({"toptheta_k": float("nan")}, ["positive number"]),
        ({"toptheta_k": 15}, ["send a k between 16 and 512"]),
        ({"toptheta_k": 513}, ["send a k between 16 and 512"]),
        ({"toptheta_k": 64, "toptheta_min_prob": 0.01}, ["exclude each other"]),
        ({"toptheta": "no"}, ['"off" or "on"', "'no'"]),
        ({"toptheta": {"k": 3}}, ['"off" or "on"']),
        ({"toptheta_layers": "all"}, ["true or false", "'all'"]),
        ({"toptheta_report": "no"}, ["true or false", "'no'"]),
        ({"toptheta_report": None}, ["true or false"]),
        ({"toptheta_report": 0, "toptheta_layers": 1}, ["toptheta_layers", "send one of both"]),
        ({"toptheta": "off", "toptheta_k": 64}, ["toptheta_k", "send one of both"]),
        ({"toptheta": "off", "toptheta_min_mass": 0.1}, ["toptheta_min_mass", "send one of both"]),
    ],
)
def test_wrong_options_are_told_what_to_send(xargs: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        POLICY.check(xargs)
    for word in words:
        assert word in str(caught.value)


def test_a_k_needs_a_table() -> None:
    policy = policy_of(SERVER, None, table=False)
    with pytest.raises(ValueError, match="no threshold table.*min_prob between 1e-05 and 0.1"):
        policy.check({"toptheta_k": 64})


def test_off_may_be_forbidden() -> None:
    policy = policy_of(SERVER, None, allow_off=False)
    with pytest.raises(ValueError, match="does not allow.*min_prob between 1e-05 and 0.1"):
        policy.check({"toptheta": "off"})


def test_counts_layer_by_layer_may_be_forbidden() -> None:
    policy = replace(POLICY, allow_layers=False)
    with pytest.raises(ValueError, match="drop toptheta_layers"):
        policy.check({"toptheta_layers": True})
    assert not policy.check({"toptheta_layers": False}).layers


@pytest.mark.parametrize(
    ("xargs", "by_server"),
    [
        ({}, (True, False)),
        ({"toptheta": "off"}, (True, False)),
        ({"toptheta_report": True}, (True, True)),
        ({"toptheta_report": False}, (False, False)),
        ({"toptheta_layers": True}, (True, True)),
    ],
)
def test_a_request_decides_whether_its_response_carries_counts(
    xargs: dict[str, Any], by_server: tuple[bool, bool]
) -> None:
    options = POLICY.check(xargs)
    for server, expected in zip((True, False), by_server, strict=True):
        assert Resolved.of(options, POLICY.server, report=server).report is expected
    without = options.model_copy(update={"report": None})
    assert cache_salt(options, None) == cache_salt(without, None), "KV does not depend on it"


@pytest.mark.parametrize(
    ("xargs", "setting"),
    [
        ({}, "default"),
        ({"toptheta_layers": True}, "default"),
        ({"toptheta_k": 64}, "k"),
        ({"toptheta_k": 64, "toptheta_min_mass": 0.1}, "k"),
        ({"toptheta_min_prob": 0.002}, "min_prob"),
        ({"toptheta_min_mass": 0.1}, "min_prob"),
        ({"toptheta_min_prob": 0.001, "toptheta_min_mass": 0.5}, "default"),
        ({"toptheta": "off"}, "off"),
    ],
)
def test_settings(xargs: dict[str, Any], setting: str) -> None:
    assert POLICY.check(xargs).setting == setting


SETTINGS: list[dict[str, Any]] = [
    {},
    {"toptheta": "off"},
    {"toptheta_k": 64},
    {"toptheta_k": 64.5},
    {"toptheta_min_prob": 0.01},
    {"toptheta_min_mass": 0.01},
    {"toptheta_min_prob": 0.01, "toptheta_min_mass": 0.01},
]


def test_salts_are_equal_exactly_where_settings_and_user_salts_are() -> None:
    # The fourth is what the salt of another user looks like from inside.
    salts = [None, "mine", "toptheta:off:", "toptheta:off:mine"]
    seen = {}
    for xargs, salt in itertools.product(SETTINGS, salts):
        made = cache_salt(POLICY.check(xargs), salt)
        assert made not in seen, (xargs, salt, seen.get(made))
        seen[made] = (xargs, salt)
    assert cache_salt(POLICY.check({"toptheta_k": 64.0}), None) == cache_salt(
        POLICY.check({"toptheta_k": 64}), None
    )


def test_the_servers_own_settings_leave_the_users_salt_alone() -> None:
    for xargs in ({}, {"toptheta_min_prob": 0.001}, {"toptheta_layers": True}):
        assert cache_salt(POLICY.check(xargs), None) is None
        assert cache_salt(POLICY.check(xargs), "mine") == "mine"


SERVERS = [
    pytest.param(policy_of(SERVER, None), id="decode"),
    pytest.param(policy_of(None, PROMPTS), id="prefill"),
    pytest.param(policy_of(None, Target(0.001)), id="prefill-same"),
    pytest.param(policy_of(SERVER, PROMPTS), id="both"),
    pytest.param(policy_of(SERVER, Target(0.001)), id="both-same"),
    pytest.param(policy_of(BY_K, Target(None, k=128)), id="both-same-k"),
    pytest.param(policy_of(BY_K, PROMPTS), id="k-and-min_prob"),
]


@pytest.mark.parametrize("policy", SERVERS)
def test_requests_share_kv_exactly_where_no_row_of_theirs_keeps_other_keys(
    policy: RequestPolicy,
) -> None:
    requests: list[dict[str, Any]] = [{"toptheta_k": k} for k in (64, 128)]
    requests += [{"toptheta_min_prob": p} for p in (0.001, 0.01)]
    requests += [{"toptheta_min_mass": m} for m in (0.0, 0.5)]
    requests += [{"toptheta_min_mass": 0.5, **one} for one in requests[:4]]
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
        (policy_of(SERVER, None), {"min_prob": 0.001}, {"min_prob": 0.01}),
        (policy_of(None, PROMPTS), {"min_prob": 0.01}, {"min_prob": 0.001}),
        (policy_of(BY_K, None), {"k": 128}, {"k": 80}),
        (policy_of(None, PROMPTS), {"min_mass": 0.3}, {"k": 64}),
    ],
)
def test_naming_what_the_server_does_changes_nothing(
    policy: RequestPolicy, own: dict[str, float], other: dict[str, float]
) -> None:
    def sent(numbers: dict[str, float]) -> dict[str, float]:
        return {f"toptheta_{name}": number for name, number in numbers.items()}

    assert policy.check(sent(own)) == RequestOptions()
    assert policy.check(sent(other)) == RequestOptions(**other)


def test_no_min_prob_is_the_servers_own_where_its_phases_differ() -> None:
    for min_prob in (0.001, 0.01):
        options = policy_of(SERVER, PROMPTS).check({"toptheta_min_prob": min_prob})
        assert options == RequestOptions(min_prob=min_prob)


def test_bounds_hold_for_whatever_is_not_the_servers_own() -> None:
    bounds = {"min_prob": (0.002, 0.003)}
    policy_of(SERVER, None, **bounds).check({"toptheta_min_prob": 0.001})
    policy_of(None, PROMPTS, **bounds).check({"toptheta_min_prob": 0.01})
    for server in ((SERVER, PROMPTS), (None, PROMPTS)):
        with pytest.raises(ValueError, match="between 0.002 and 0.003"):
            # Its prompt would keep more than the operator allows.
            policy_of(*server, **bounds).check({"toptheta_min_prob": 0.001})


@pytest.mark.parametrize(
    ("server", "xargs", "expected"),
    [
        ((SERVER, None), {}, (SERVER, None)),
        ((SERVER, None), {"toptheta_min_prob": 0.02}, (Target(0.02, 0.5), None)),
        ((SERVER, None), {"toptheta_k": 64}, (Target(None, 0.5, 64), None)),
        ((BY_K, None), {"toptheta_min_prob": 0.02}, (Target(0.02, 0.0), None)),
        ((BY_K, None), {"toptheta_min_mass": 0.2}, (Target(None, 0.2, 128), None)),
        ((None, PROMPTS), {}, (None, PROMPTS)),
        ((None, PROMPTS), {"toptheta_k": 64}, (None, Target(None, 0.0, 64))),
        (
            (SERVER, PROMPTS),
            {"toptheta_min_prob": 0.02, "toptheta_min_mass": 0.2},
            (Target(0.02, 0.2), Target(0.02, 0.0)),
        ),
        ((SERVER, PROMPTS), {"toptheta": "off"}, (None, None)),
    ],
)
def test_a_requests_numbers_hold_wherever_the_server_prunes(
    server: tuple[Target | None, Target | None],
    xargs: dict[str, Any],
    expected: tuple[Target | None, Target | None],
) -> None:
    assert Targets(*server).of(RequestOptions.parse(xargs)) == Targets(*expected)
