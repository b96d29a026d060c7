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

SHIPPED = sorted((Path(__file__).parent.parent / "thresholds").glob("*/*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> ThresholdStore:
    return ThresholdStore(shipped_dir=tmp_path / "shipped", user_dir=tmp_path / "user")


def test_auto_goes_by_identity_not_by_name(store: ThresholdStore) -> None:
    make_table(make_identity(vocab_size=7)).save(
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
    make_table(make_identity(vocab_size=7)).save(store.path_for(make_identity("org/foreign"), "a"))
    with pytest.raises(FileNotFoundError) as caught:
        store.find("auto", make_identity())
    message = str(caught.value)
    for part in (
        str(store.user_dir),
        str(store.shipped_dir),
        "toptheta calibrate org/model",
        "org--foreign",
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
    assert store.find(str(path), make_identity()).path == path
    with pytest.raises(ValueError, match="vocab_size: got 100, expected 7"):
        store.find(str(path), make_identity(vocab_size=7))


@pytest.mark.parametrize("spec", ["org--model", "org/model"])
def test_name(store: ThresholdStore, spec: str) -> None:
    path = store.shipped_dir / "org--model" / "a.safetensors"  # type: ignore[operator]
    make_table().save(path)
    assert store.find(spec, make_identity()).path == path
    with pytest.raises(ValueError, match="vocab_size: got 100, expected 7"):
        store.find(spec, make_identity(vocab_size=7))


def test_unknown_name(store: ThresholdStore) -> None:
    with pytest.raises(FileNotFoundError, match="asked for 'org--none'"):
        store.find("org--none", make_identity())


def test_user_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    assert ThresholdStore().user_dir == tmp_path / "thresholds"


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
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"eos_token_id": 3},
        {"attn_logit_softcapping": 50.0},
    ],
)
def test_identity_notices(fields: dict[str, object]) -> None:
    other = make_identity(**fields)
    assert not make_identity().matches(other)
    assert make_identity().differences(other)


def test_identity_refuses_heads_that_differ_by_layer() -> None:
    with pytest.raises(ValueError, match="num_attention_heads is \\[4, 2\\]"):
        make_identity(num_attention_heads=[4, 2])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_tables(path: Path) -> None:
    table = ThresholdTable.load(path)
    identity = table.metadata.identity
    assert path.parent.name == folder_name(identity.name)
    assert path.stat().st_size < 1 << 20
    assert table.metadata.command.startswith(f"toptheta calibrate {identity.name} --tokens ")
    assert ThresholdStore(user_dir=path.parent / "none").find("auto", identity).table.num_layers


def test_there_is_a_shipped_table() -> None:
    assert SHIPPED
