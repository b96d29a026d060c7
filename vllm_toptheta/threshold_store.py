"""Where threshold tables live: a name, path or "auto" and a model's identity in, the table that
belongs to it out.
"""

import logging
import os
import stat
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import TableMetadata, ThresholdTable, read_metadata

logger = logging.getLogger("vllm.toptheta")


class FoundTable(NamedTuple):
    """A table and the file it came from.

    Attributes:
        table: the table.
        path: its file.
        differs: fields of its model's config that the served model has otherwise; "" without any.
        scores_differ: whether they change attention scores, so that it was not calibrated for them.
    """

    table: ThresholdTable
    path: Path
    differs: str = ""
    scores_differ: bool = False


class ThresholdStore:
    """Two folders of tables: the shipped ones and the user's own.

    A folder holds `<org>--<model>/<any name>.safetensors`. Names are for people: tables are matched
    by the identity inside them.
    """

    def __init__(self, shipped_dir: Path | None = None, user_dir: Path | None = None) -> None:
        """Use the standard folders unless others are given.

        Args:
            shipped_dir: the wheel's, or a checkout's `thresholds/`, by default.
            user_dir: `$TOPTHETA_HOME/thresholds`, or `~/.cache/toptheta/thresholds`, by default.
        """
        self.shipped_dir = shipped_dir or _default_shipped_dir()
        self._user_dir = user_dir or _default_user_dir()

    @property
    def user_dir(self) -> Path:
        """The user's folder.

        Raises:
            ValueError: the user has none; says what to type.
        """
        if self._user_dir is None:
            raise ValueError(f"no place for threshold tables: {_HOMELESS}")
        return self._user_dir

    def path_for(self, identity: ModelIdentity, stem: str) -> Path:
        """Where a new table of the model goes, in the user's folder."""
        return self.user_dir / folder_name(identity.name) / f"{stem}.safetensors"

    def find(self, spec: str, identity: ModelIdentity) -> FoundTable:
        """Find the table for a model. Files that cannot be read as one are logged and skipped.

        Args:
            spec: "auto" (any table whose identity matches: the user's newest first, then shipped),
                the path of a file, or the name of a folder in the store ("org--model" or
                "org/model"). A table that is named needs as many layers and heads only.
            identity: the model that is to be served.

        Raises:
            FileNotFoundError: no table; says where it was looked for and what to type next.
            ValueError: the named table is broken, or has other layers or heads (names the fields
                that differ).
        """
        if spec != "auto" and (path := Path(spec).expanduser()).is_file():
            table = ThresholdTable.load(path)
            table.check_model(identity, source=f"table {path}")
            return _found(table, path, identity)
        rejected: list[str] = []
        near: FoundTable | None = None
        for path in self._candidates(None if spec == "auto" else folder_name(spec)):
            try:
                metadata = _metadata_of(path)
                fits = metadata.identity.fits(identity)
                if fits and metadata.identity.matches(identity):
                    return _found(ThresholdTable.load(path), path, identity)
                if fits and spec != "auto" and near is None:
                    near = _found(ThresholdTable.load(path), path, identity)
            except Exception as error:  # a file may hold anything, and others are good
                rejected.append(str(error))
                logger.warning("toptheta skips a file that is not a table it can use: %s", error)
                continue
            rejected.append(f"{path}: for another model, {_model_of(metadata)}")
            if fits or spec != "auto":
                rejected[-1] += f" ({metadata.identity.differences(identity)})"
        if near is not None:
            return near
        message = (
            f"no threshold table for {identity.name or 'this model'} "
            f"(config hash {identity.config_hash[:12]}, asked for {spec!r}) in "
            f"{self._user_dir or _HOMELESS} or {self.shipped_dir or 'the package (none shipped)'}; "
            f"make one with: toptheta calibrate {identity.name or 'MODEL'}"
        )
        if rejected:
            message += "\n  looked at " + "\n  looked at ".join(rejected)
        if spec != "auto" and rejected:
            raise ValueError(message)
        raise FileNotFoundError(message)

    def check(self) -> tuple[list[Path], list[str]]:
        """Read every file of the store, the user's first.

        Returns:
            The tables, and what is wrong with each of the other files.
        """
        tables, problems = [], []
        for path in self._candidates(None):
            try:
                _metadata_of(path)
                ThresholdTable.load(path)
                tables.append(path)
            except Exception as error:  # a file may hold anything, and others are good
                problems.append(str(error))
        return tables, problems

    def _candidates(self, folder: str | None) -> Iterator[Path]:
        """Files of all models or of one folder: the user's, newest first, then the shipped ones by
        name.
        """
        pattern = f"{folder or '*'}/*.safetensors"
        if self._user_dir is not None:
            yield from sorted(self._user_dir.glob(pattern), key=_modified, reverse=True)
        if self.shipped_dir is not None:
            yield from sorted(self.shipped_dir.glob(pattern))


def folder_name(model_name: str) -> str:
    """The store's folder of a model: "org/model" and a local path "…/org/model" become
    "org--model".
    """
    parts = [part for part in model_name.split("/") if part not in ("", ".", "..")]
    return "--".join(parts[-2:]) or "unnamed"


def _found(table: ThresholdTable, path: Path, identity: ModelIdentity) -> FoundTable:
    of_table = table.metadata.identity
    differs = of_table.differences(identity, decisive=False)
    return FoundTable(table, path, differs, not of_table.matches(identity))


def _metadata_of(path: Path) -> TableMetadata:
    """Read a file's provenance.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a table.
    """
    # A pipe would be waited for, and what safetensors says of a folder names no path.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"threshold table {path}: not a file")
    with path.open("rb"):  # the error names the path, as that of safetensors does not
        return read_metadata(path)


def _modified(path: Path) -> float:
    """When a file was written; long ago where nobody can tell, as of a dangling link."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _model_of(metadata: TableMetadata) -> str:
    return metadata.identity.name or f"unnamed, config hash {metadata.identity.config_hash[:12]}"


_HOMELESS = "a home that this user does not have (export TOPTHETA_HOME=FOLDER)"


def _default_user_dir() -> Path | None:
    try:
        home = Path(os.environ.get("TOPTHETA_HOME") or "~/.cache/toptheta").expanduser()
    except RuntimeError:  # no HOME, and no entry in passwd
        return None
    return home / "thresholds"


def _default_shipped_dir() -> Path | None:
    package = Path(str(resources.files("vllm_toptheta")))
    for folder in (package / "_shipped_thresholds", package.parent / "thresholds"):
        if folder.is_dir():
            return folder
    return None
