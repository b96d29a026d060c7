"""Options: what is accepted, and the one message every wrong option gives."""

import pytest

from vllm_toptheta.config import TopThetaConfig


def parse(options: object) -> TopThetaConfig:
    return TopThetaConfig.from_additional_config({"toptheta": options})


def test_defaults_apply_where_nothing_is_given() -> None:
    assert TopThetaConfig.from_additional_config({}) == TopThetaConfig()
    assert parse({}) == TopThetaConfig()


def test_layer_overrides_take_json_keys() -> None:
    config = parse({"min_prob": 0.01, "layers": {"0": {"min_prob": 1e-4}, "7": {"dense": True}}})
    assert config.min_prob == 0.01
    assert config.layers[0].min_prob == 1e-4
    assert config.layers[7].dense


def test_ranges_are_json_lists() -> None:
    config = parse({"min_prob_range": [1e-5, 0.01], "min_mass_range": [0.5, 0.5]})
    assert config.min_prob_range == (1e-5, 0.01)
    assert config.min_mass_range == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ks": 3}, ["unknown option 'ks'", "did you mean 'k'"]),
        ({"min_probs": 3}, ["unknown option 'min_probs'", "did you mean 'min_prob'"]),
        ({"min_kv_length": 3}, ["unknown option 'min_kv_length'", "did you mean 'min_kv_len'"]),
        ({"min_prob": 0}, ["'min_prob'", "greater than 0", "got 0"]),
        ({"min_prob": 1.0}, ["'min_prob'", "less than 1", "1.0"]),
        ({"min_prob": "small"}, ["'min_prob'", "valid number", "'small'"]),
        ({"min_prob": float("nan")}, ["'min_prob'", "nan"]),
        ({"min_mass": 1}, ["'min_mass'", "less than 1", "got 1"]),
        ({"min_mass": -0.1}, ["'min_mass'", "greater than or equal to 0", "-0.1"]),
        ({"k": -1}, ["'k'", "greater than 0", "-1"]),
        ({"k": "many"}, ["'k'", "valid number", "'many'"]),
        ({"k": float("nan")}, ["'k'", "finite"]),
        ({"k": 64, "min_prob": 0.001}, ["'k' and 'min_prob' exclude each other"]),
        ({"prefill_min_prob": 0}, ["'prefill_min_prob'", "greater than 0", "0"]),
        ({"prefill_k": 64}, ["option 'prefill_k' is gone", "prefill_min_prob"]),
        ({"group_size": 16}, ["option 'group_size' is gone", "--block-size"]),
        ({"min_kv_len": 1.5}, ["'min_kv_len'", "1.5"]),
        ({"min_kv_len": 2**31}, ["'min_kv_len'", "less than 2147483648"]),
        ({"compensation": "yes"}, ["'compensation'", "'yes'"]),
        ({"layers": [1]}, ["'layers'", "dictionary"]),
        ({"layers": {"first": {}}}, ["layers.first", "integer"]),
        ({"layers": {"1": {"prob": 2}}}, ["unknown option 'layers.1.prob'", "mean 'min_prob'"]),
        ({"layers": {"1": {"k": 2}}}, ["option 'layers.1.k' is gone", "min_prob"]),
        (
            {"layers": {"1": {"min_prob": 0.1, "dense": True}}},
            ["layers.1", "a dense layer takes no min_prob"],
        ),
        ({"min_prob_range": [0.1, 0.01]}, ["'min_prob_range'", "must not be above the second"]),
        ({"min_prob_range": [0, 0.01]}, ["min_prob_range.0", "greater than 0"]),
        ({"min_mass_range": [0, 1]}, ["min_mass_range.1", "less than 1"]),
        ({"min_mass_range": [0.5]}, ["min_mass_range"]),
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


@pytest.mark.parametrize("options", [{"min_prob" * 10**6: 1}, {"thresholds": ["x" * 10**7] * 9}])
@pytest.mark.usefixtures("short_guesses")
def test_options_of_any_length_are_told_at_once_and_in_few_words(options: object) -> None:
    with pytest.raises(ValueError, match="toptheta") as caught:
        parse(options)
    assert len(str(caught.value)) < 2000
