"""Options: what is accepted, and the one message every wrong option gives."""

import pytest

from vllm_toptheta.config import TopThetaConfig


def parse(options: object) -> TopThetaConfig:
    return TopThetaConfig.from_additional_config({"toptheta": options})


def test_defaults_apply_where_nothing_is_given() -> None:
    assert TopThetaConfig.from_additional_config({}) == TopThetaConfig()
    assert parse({}) == TopThetaConfig()


def test_layer_overrides_take_json_keys() -> None:
    config = parse({"k": 64, "layers": {"0": {"k": 512}, "7": {"dense": True}}})
    assert config.k == 64
    assert config.layers[0].k == 512
    assert config.layers[7].dense


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 128),
        ({"k": 64}, 64),
        ({"k": 64, "prefill_k": None}, 64),
        ({"prefill_k": 80, "k": 64}, 80),
    ],
)
def test_prompts_keep_k_keys_unless_told_otherwise(
    options: dict[str, object], expected: float
) -> None:
    assert parse(options).prefill_k == expected


def test_a_wrong_k_is_named_once() -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        parse({"k": "many"})
    assert "prefill_k" not in str(caught.value).split("Options are")[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ks": 3}, ["unknown option 'ks'", "did you mean 'k'"]),
        ({"min_kv_length": 3}, ["unknown option 'min_kv_length'", "did you mean 'min_kv_len'"]),
        ({"k": -1}, ["'k'", "greater than 0", "-1"]),
        ({"k": "many"}, ["'k'", "valid number", "'many'"]),
        ({"k": float("nan")}, ["'k'", "finite"]),
        ({"prefill_k": 0}, ["'prefill_k'", "greater than 0", "0"]),
        ({"prefill_k": "k"}, ["'prefill_k'", "valid number", "'k'"]),
        ({"min_kv_len": 1.5}, ["'min_kv_len'", "1.5"]),
        ({"compensation": "yes"}, ["'compensation'", "'yes'"]),
        ({"group_size": 24}, ["'group_size'", "16, 32, 64 or 128", "24"]),
        ({"layers": [1]}, ["'layers'", "dictionary"]),
        ({"layers": {"first": {}}}, ["layers.first", "integer"]),
        ({"layers": {"1": {"kk": 2}}}, ["unknown option 'layers.1.kk'", "did you mean 'k'"]),
        ({"layers": {"1": {"k": 2, "dense": True}}}, ["layers.1", "a dense layer takes no k"]),
        (7, ["JSON object", "int"]),
        ("auto", ["JSON object", "str"]),
    ],
)
def test_wrong_options_give_one_error_that_says_what_to_type(
    options: object, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        parse(options)
    for word in [*words, "--additional-config"]:
        assert word in str(caught.value)


def test_every_wrong_option_is_named() -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        parse({"kay": 3, "min_kv_len": -1})
    assert "'kay'" in str(caught.value)
    assert "'min_kv_len'" in str(caught.value)
