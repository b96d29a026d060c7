"""The store: tables are found by the identity inside them, and errors say where was looked and what
to type next.
"""

import logging
import os
from pathlib import Path

import pytest
from threshold_fixtures import FakeConfig, make_identity, make_table

from vllm_toptheta import doctor
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore, folder_name
from vllm_toptheta.thresholds import ThresholdTable

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0],
    "long_factor": [4.0],
    "original_max_position_embeddings": 512,
}
SHIPPED = sorted((Path(__file__).parent.parent / "thresholds").glob("*/*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> ThresholdStore:
    return ThresholdStore(shipped_dir=tmp_path / "shipped", user_dir=tmp_path / "user")


def test_auto_goes_by_identity_not_by_name(store: ThresholdStore) -> None:
    make_table(make_identity(hidden_size=128)).save(
        store.user_dir / "org--model" / "table.safetensors"
    )
    path = store.shipped_dir / "someone--else" / "anything.safetensors"  # type: ignore[operator]
    make_table().save(path)
    assert store.find("auto", make_identity("/another/path")).path == path


def test_auto_prefers_the_users_newest(store: ThresholdStore) -> None:
    old, new = (store.path_for(make_identity(), stem) for stem in ("a", "b"))
    for path in (new, old, store.shipped_dir / "x" / "c.safetensors"):  # type: ignore[operator]
        make_table().save(path)
    os.utime(old, (1, 1))
    assert store.find("auto", make_identity()).path == new


def test_auto_without_a_table_says_where_and_what_next(store: ThresholdStore) -> None:
    foreign = make_identity("org/foreign", hidden_size=128)
    make_table(foreign).save(store.path_for(foreign, "a"))
    with pytest.raises(FileNotFoundError) as caught:
        store.find("auto", make_identity())
    message = str(caught.value)
    for part in (
        str(store.user_dir),
        str(store.shipped_dir),
        "toptheta calibrate org/model",
        "org--foreign",
        "hidden_size: got 128, expected 64",
    ):
        assert part in message


def test_broken_file_of_another_model_does_not_stop_auto(store: ThresholdStore) -> None:
    make_table().save(store.path_for(make_identity(), "good"))
    (store.user_dir / "broken").mkdir()
    (store.user_dir / "broken" / "x.safetensors").write_bytes(b"x")
    assert store.find("auto", make_identity()).path.stem == "good"


def make_bad(kind: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "dangling link":
        path.symlink_to(path.with_suffix(".gone"))
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        make_table().save(path)
        path.chmod(0)
    elif kind == "empty":
        path.touch()
    else:
        make_table().save(path)
        path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")  # the last float becomes NaN


BAD = ["dangling link", "link to itself", "folder", "pipe", "unreadable", "empty", "nan"]


@pytest.mark.parametrize("folder", ["org--model", "another--one"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_and_skipped(
    store: ThresholdStore,
    kind: str,
    folder: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    good = store.path_for(make_identity(), "good")
    make_table().save(good)
    os.utime(good, (1, 1))
    bad = store.user_dir / folder / "bad.safetensors"
    make_bad(kind, bad)
    if kind == "unreadable" and os.access(bad, os.R_OK):
        pytest.skip("root may read everything")
    found = store.find("auto", make_identity())
    assert found.path == good
    tables, problems = store.check()
    assert tables == [good]
    assert [str(bad) in problem for problem in problems] == [True]
    if kind not in ("dangling link", "link to itself"):  # without a date they come last
        assert str(bad) in caplog.text
    good.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        store.find("auto", make_identity())
    assert str(bad) in str(caught.value)


def test_the_doctor_names_bad_files_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    bad = tmp_path / "thresholds" / "org--model" / "bad.safetensors"
    make_bad("pipe", bad)
    finding = doctor.check_tables()
    assert finding.status == "warn"
    assert str(bad) in finding.text
    assert f"{len(SHIPPED)} threshold tables" in finding.text
    bad.unlink()
    assert doctor.check_tables().status == "ok"


def test_explicit_path(store: ThresholdStore, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    make_table().save(path)
    found = store.find(str(path), make_identity())
    assert (found.path, found.differs, found.scores_differ) == (path, "", False)
    with pytest.raises(ValueError, match="num_hidden_layers: got 2, expected 3"):
        store.find(str(path), make_identity(num_hidden_layers=3))


@pytest.mark.parametrize("spec", ["org--model", "org/model"])
def test_name(store: ThresholdStore, spec: str) -> None:
    path = store.shipped_dir / "org--model" / "a.safetensors"  # type: ignore[operator]
    make_table().save(path)
    assert store.find(spec, make_identity()).path == path
    with pytest.raises(ValueError, match="num_hidden_layers: got 2, expected 3"):
        store.find(spec, make_identity(num_hidden_layers=3))


def test_a_named_table_is_taken_for_other_scores_and_says_so(store: ThresholdStore) -> None:
    make_table().save(store.path_for(make_identity(), "a"))
    yarn = make_identity(rope_parameters=YARN)
    with pytest.raises(FileNotFoundError, match="rope: got .*, expected .*yarn"):
        store.find("auto", yarn)
    found = store.find("org/model", yarn)
    assert found.scores_differ
    assert "'rope_type': 'yarn'" in found.differs


def test_auto_finds_a_siblings_table_and_says_what_differs(store: ThresholdStore) -> None:
    path = store.path_for(make_identity(), "a")
    make_table(make_identity(eos_token_id=2)).save(path)
    found = store.find("auto", make_identity("me/tuned", vocab_size=108, eos_token_id=3))
    assert found.path == path
    assert not found.scores_differ
    assert found.differs == (
        "eos_token_id: got [2], expected [3]; vocab_size: got 100, expected 108"
    )


def test_unknown_name(store: ThresholdStore) -> None:
    with pytest.raises(FileNotFoundError, match="asked for 'org--none'"):
        store.find("org--none", make_identity())


def test_user_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    assert ThresholdStore().user_dir == tmp_path / "thresholds"


def test_a_user_without_a_home_is_served_from_shipped_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TOPTHETA_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # nobody in passwd
    identity = make_identity()
    make_table(identity).save(tmp_path / "shipped" / "org--model" / "t.safetensors")
    store = ThresholdStore(shipped_dir=tmp_path / "shipped")
    assert store.find("auto", identity).path.name == "t.safetensors"
    with pytest.raises(FileNotFoundError, match="export TOPTHETA_HOME"):
        store.find("auto", make_identity(num_hidden_layers=7))
    with pytest.raises(ValueError, match="export TOPTHETA_HOME"):
        store.path_for(identity, "t")


def test_folder_name() -> None:
    assert folder_name("org/model") == "org--model"
    assert folder_name("/data/org/model/") == "org--model"
    assert folder_name("") == "unnamed"


def test_identity_ignores_path_dtype_spelling_and_the_output_head() -> None:
    plain = make_identity("a")
    spelled = FakeConfig(
        _name_or_path="/x",
        dtype="bfloat16",
        tie_word_embeddings=True,
        head_dim=16,
        rope_parameters=None,
        rope_scaling={"type": "default"},
        rope_theta=10000,
        sliding_window=None,
    )
    assert plain.matches(ModelIdentity.from_config(spelled))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"sliding_window": 128},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 128},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"rope_parameters": YARN},
        {"hidden_size": 128},
        {"attn_logit_softcapping": 50.0},
    ],
)
def test_identity_notices(fields: dict[str, object]) -> None:
    other = make_identity(**fields)
    assert not make_identity().matches(other)
    assert make_identity().differences(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": 3},
        {"bos_token_id": [0, 1]},
        {"vocab_size": 7},
        {"quantization_config": {"quant_method": "awq"}},
        {"max_position_embeddings": 1 << 20},
        {"layer_types": ["full_attention"] * 2},
        {"sliding_window": 128, "use_sliding_window": False},
    ],
)
def test_what_does_not_change_scores_does_not_matter(fields: dict[str, object]) -> None:
    assert make_identity().matches(make_identity(**fields))
    assert make_identity().differences(make_identity(**fields)) == ""


def test_a_window_that_no_row_outgrows_is_none() -> None:
    windowed = make_identity(sliding_window=64)

    def served(max_len: int) -> ModelIdentity:
        return ModelIdentity.from_config(FakeConfig(), max_len=max_len)

    # As --disable-sliding-window, which caps the length.
    assert windowed.matches(served(64))
    assert served(64).matches(windowed)
    assert not windowed.matches(served(65))


@pytest.mark.parametrize(("first", "second", "same"), [(256, 512, True), (256, 513, False)])
def test_longrope_goes_by_the_factors_in_use(first: int, second: int, same: bool) -> None:
    config = FakeConfig(rope_parameters=LONGROPE, max_position_embeddings=2048)
    one, other = (ModelIdentity.from_config(config, max_len=n) for n in (first, second))
    assert one.matches(other) is same
    assert ModelIdentity.from_config(config).matches(other) is not same
    assert ("long_factor" in str(other.fields["rope"])) is not same


def test_heads_that_differ_by_layer() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is \\[4, 2\\]"):
        make_identity(num_attention_heads=[4, 2])
    layers = [FakeConfig(head_dim=16), FakeConfig(head_dim=32, num_key_value_heads=1)]
    identity = make_identity(is_heterogeneous=True, per_layer_config=layers)
    assert (identity.head_dim, identity.num_kv_heads) == (32, 2)
    assert [identity.kv_heads_of(layer) for layer in range(2)] == [2, 1]
    assert not identity.uniform
    assert not identity.fits(make_identity())
    assert make_identity().uniform


@pytest.mark.parametrize(
    ("fields", "kv_heads"),
    [({"num_kv_heads": 2}, 2), ({"multi_query": True}, 1), ({}, 4)],
)
def test_kv_heads_by_their_other_names(fields: dict[str, object], kv_heads: int) -> None:
    assert make_identity(num_key_value_heads=None, **fields).num_kv_heads == kv_heads


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_tables(path: Path) -> None:
    table = ThresholdTable.load(path)
    identity = table.metadata.identity
    assert path.parent.name == folder_name(identity.name)
    assert path.stat().st_size < 1 << 20
    assert table.metadata.command.startswith(f"toptheta calibrate {identity.name} --")
    assert ThresholdStore(user_dir=path.parent / "none").find("auto", identity).table.num_layers


def test_there_is_a_shipped_table() -> None:
    assert SHIPPED
