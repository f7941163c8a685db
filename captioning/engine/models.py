"""Which model a name means: found out before anything is started for it, where no engine may be.

A name means another model when a folder's files change or a repository moves on. A caption set
records the identity, by which its shards are told from those of another model.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.errors import EvenmixError
from pipeline.hub import model_file

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"


@dataclass(frozen=True)
class ModelIdentity:
    """A model to the byte, as far as it can be known.

    ``name`` is the name of a folder, a name on the Hugging Face Hub, a URL, or what an endpoint
    calls it; ``location`` is where an engine finds it, so for a folder its absolute path, which is
    recorded nowhere. ``revision`` is a commit of the Hub, ``sha256:`` and a digest of the files of
    a folder, ``listing-sha256:`` and a digest of what a store says of its files, or None at an
    endpoint.
    """

    name: str
    revision: str | None
    location: str

    @property
    def hub_commit(self) -> str | None:
        """The revision if it is a commit of the Hub."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def resolve(model: str, revision: str | None, endpoint: str | None) -> ModelIdentity:
    """Find out which model is meant.

    A local folder is read; of a model on the Hub its ``config.json`` is fetched, or taken from the
    local cache where the Hub is out of reach (``HF_HUB_OFFLINE=1``). ``revision`` is a commit,
    branch or tag of the Hub. With an ``endpoint`` nothing is known but the name.

    Raises:
        EvenmixError: there is no such model or revision, or it is not open to the user.
    """
    if endpoint is not None:
        return ModelIdentity(model, None, model)
    name = locate(model)
    if is_url(name):
        _refuse_revision(name, revision)
        return ModelIdentity(name, listing_digest(name), name)
    if Path(name).is_absolute():
        _refuse_revision(name, revision)
        return ModelIdentity(Path(name).name, _folder_digest(Path(name)), name)
    return ModelIdentity(name, _hub_commit(name, revision), name)


def locate(model: str) -> str:
    """Return a model's name as every process of this machine understands it; the Hub is not asked.

    Raises:
        EvenmixError: it is neither a folder with a checkpoint, nor a URL, nor a name of the Hub.
    """
    if is_url(model):
        return model
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / _CONFIG).is_file():
            raise EvenmixError(f"the model folder {folder} has no {_CONFIG}; name a checkpoint")
        return str(folder.resolve())
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise EvenmixError(
            f"the model {model} does not exist; give a folder with a checkpoint, or a name such as "
            "Qwen/Qwen3-VL-4B-Instruct"
        )
    return model


def is_url(model: str) -> bool:
    """Tell whether a model is in a store, such as gs://bucket/model."""
    return "://" in model


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise EvenmixError(
            f"the model {name} has no revision {revision}, since it is not on the Hub; remove it"
        )


def _folder_digest(folder: Path) -> str:
    """Hash the names and contents of a folder's files.

    Hidden files are left out: they are notes of git or of huggingface_hub, which no engine reads.
    """
    files = {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_file_digest, files.values())
        return f"sha256:{_digest(zip(files, digests, strict=True))}"


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EvenmixError(f"the model file {path} cannot be read: {error}") from error


def listing_digest(url: str) -> str:
    """Hash what a store says of the files of a model: names, sizes, versions."""
    files = storage.list_files(url)
    if _CONFIG not in {file.name for file in files}:
        raise EvenmixError(f"the model {url} has no {_CONFIG}; name a folder with a checkpoint")
    rows = [(file.name, str(file.num_bytes), str(file.version or file.modified)) for file in files]
    return f"listing-sha256:{_digest(rows)}"


def _digest(rows: Iterable[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(("\0".join(row) + "\n").encode())
    return digest.hexdigest()


def _hub_commit(model: str, revision: str | None) -> str:
    file = model_file(model, revision, _CONFIG)
    if file is None:
        raise EvenmixError(f"the model {model} has no {_CONFIG}; name one that vLLM can load")
    # <cache>/models--OWNER--NAME/snapshots/<commit>/config.json
    return file.parent.name
