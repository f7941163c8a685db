"""`evenmix mirror`: copy a source that cannot be read in parallel where it is, and make it so.

Some datasets are one huge file: a tar of 511 GB, a tar.gz, a SQLite file. The file is copied in
parts into R/sources/<dataset>, checked as a whole, and made readable by many workers at once: a tar
stays in its parts, a compressed tar is decompressed into parts, a table becomes Parquet.
``mirror.json`` with the checksums of what is there is written last: it is the commit. Started
again, the command does what is missing.
"""

import argparse
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from rich.filesize import decimal

from pipeline import copying, hub, storage, unpacking
from pipeline.byte_progress import ByteProgress
from pipeline.catalog import CATALOG
from pipeline.copying import PART_BYTES, Copy
from pipeline.dataset import Dataset
from pipeline.errors import EvenmixError, did_you_mean
from pipeline.mirror_manifest import MANIFEST, Manifest, publish_manifest, read_manifest
from pipeline.progress import console
from pipeline.receipts import Checksum, checksum
from pipeline.recipe import load_recipe
from pipeline.records import SOURCES
from pipeline.storage import TEMPORARY_PREFIX, FileInfo

_RECORDS = (".source.json", ".checked.json")  # what a copy leaves beside the files to be read
_COMPRESSED = (".tar.gz", ".tgz")
_PARQUET_SHARE = 4  # a table's text shrinks to no less than about a quarter


def mirror(
    root: str,
    name: str,
    dataset: Dataset,
    checksums: Mapping[str, str],
    *,
    scratch: str | None = None,
    part_bytes: int = PART_BYTES,
) -> dict[str, Checksum]:
    """Mirror a dataset's source and return the checksums of the files to be read, by name.

    ``checksums`` are those known of the source's files, such as ``md5:0123…``, by file name.
    ``scratch`` is a folder where a SQLite file has room (None: the system's temporary folder).

    Raises:
        EvenmixError: the source needs no mirror, cannot be read, has changed, or is not what the
            checksums say; or the copy cannot be written.
    """
    if dataset.layout not in ("tar", "sqlite"):
        raise EvenmixError(
            f"dataset {name}: layout {dataset.layout} is read in parallel where it is; it needs "
            "no mirror"
        )
    folder = storage.join(root, SOURCES, name)
    manifest = _finished(folder, dataset)
    if manifest is None:
        source, revision = hub.resolve(dataset.source, dataset.revision)
        copies = _plan(folder, name, dataset, source, part_bytes)
        _check_room(copies, folder, dataset, scratch)
        files: dict[str, Checksum] = {}
        for copy in copies:
            files |= _mirror_file(copy, folder, dataset, checksums, scratch)
        named = {url.removeprefix(f"{folder}/"): file for url, file in files.items()}
        manifest = Manifest(dataset.source, revision, named)
        publish_manifest(folder, manifest)
    storage.sweep(folder)
    return dict(manifest.files)


def mirrored(root: str, name: str, dataset: Dataset) -> Dataset:
    """Return a dataset as it is read from its mirror: the same records by the same rules.

    Its revision is the commit that was mirrored.

    Raises:
        EvenmixError: there is no finished mirror, or it is one of another source.
    """
    folder = storage.join(root, SOURCES, name)
    manifest = _finished(folder, dataset)
    if manifest is None:
        raise EvenmixError(
            f"dataset {name} has no mirror in {folder} yet: run `evenmix mirror {name}` first"
        )
    changes: dict[str, Any] = {"mirror": False, "revision": manifest.revision}
    # Neither pattern matches what an interrupted command has left under a temporary name.
    if dataset.layout == "sqlite":
        changes |= {"layout": "url_list", "table": None}
        changes["source"] = storage.join(folder, "[!.]*.parquet")
    else:
        changes["source"] = storage.join(folder, "[!.]*.tar.part-*")
    return dataset.model_copy(update=changes)


def for_trial(root: str, name: str, dataset: Dataset) -> Dataset:
    """Return a dataset as its first records are read: from its mirror, or without one in place.

    Whoever plans its items must say that they are for a trial. Of a SQLite file that is not local
    no part can be read; its plan says so.
    """
    if _finished(storage.join(root, SOURCES, name), dataset) is not None:
        return mirrored(root, name, dataset)
    source, revision = hub.resolve(dataset.source, dataset.revision)
    return dataset.model_copy(update={"source": source, "revision": revision, "mirror": False})


def verify_mirror(folder: str) -> list[str]:
    """Compare a finished mirror's files with its manifest; return what is wrong, a line each."""
    try:
        manifest = read_manifest(folder)
    except EvenmixError as error:
        return [str(error)]
    assert manifest is not None, "verify_mirror is for finished mirrors"
    files = {file.name for file in storage.list_files(folder)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(partial(_verify_file, folder, files), manifest.files.items())
        wrong = [finding for finding in found if finding]
    return wrong + [
        f"{storage.join(folder, name)}: belongs to no finished work; remove it"
        for name in sorted(files - manifest.files.keys() - {MANIFEST})
        if not name.endswith(_RECORDS)
    ]


def _verify_file(folder: str, files: set[str], published: tuple[str, Checksum]) -> str | None:
    name, expected = published
    url = storage.join(folder, name)
    if name not in files:
        return f"{url}: is missing; remove {MANIFEST} beside it and mirror again"
    if checksum(storage.read_chunks(url)) != expected:
        return (
            f"{url}: its bytes are not those that were published; remove it and {MANIFEST}, and "
            "mirror again"
        )
    return None


def _finished(folder: str, dataset: Dataset) -> Manifest | None:
    """Return the manifest of a dataset's mirror, None if that is not finished.

    Raises:
        EvenmixError: it is damaged, or that of another source or revision.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    copied, wanted = manifest.source, dataset.source
    revision = dataset.revision
    if copied == wanted and revision and not hub.is_meant(str(manifest.revision), revision):
        copied, wanted = f"revision {manifest.revision}", f"revision {revision}"
    if copied != wanted:
        raise EvenmixError(
            f"{folder} is the mirror of {copied}, not of {wanted}; remove it, or give the dataset "
            "another name"
        )
    return manifest


def _plan(folder: str, name: str, dataset: Dataset, source: str, part_bytes: int) -> list[Copy]:
    """List the files at ``source``, at a full revision, and where each of them goes.

    Raises:
        EvenmixError: there are none, or they cannot be mirrored.
    """
    files = storage.glob_files(source)
    if not files:
        raise EvenmixError(f"dataset {name}: nothing at {dataset.source}; correct its source")
    for file in files:
        if "/" in file.name:
            raise EvenmixError(f"{file.url} is below the source's folder; name one folder")
        if dataset.layout == "tar" and not file.name.endswith((".tar", *_COMPRESSED)):
            raise EvenmixError(f"{file.url} is neither .tar nor .tar.gz; unpack or convert it")
        if file.num_bytes == 0:
            raise EvenmixError(f"{file.url} is empty; correct the source")
    outputs = Counter(_output(folder, dataset, file) for file in files)
    for output, count in outputs.items():
        if count > 1:
            raise EvenmixError(f"{count} files at {dataset.source} would become {output}")
    return [
        Copy(
            file,
            target=storage.join(folder, ("" if _stays(file) else TEMPORARY_PREFIX) + file.name),
            record=storage.join(folder, file.name),
            part_bytes=part_bytes,
        )
        for file in files
    ]


def _stays(file: FileInfo) -> bool:
    """Tell whether the parts of a file are read as they are."""
    return file.name.endswith(".tar")


def _output(folder: str, dataset: Dataset, file: FileInfo) -> str:
    """Return the URL of what is read in the end, without the numbers of its parts."""
    name = file.name
    if dataset.layout == "tar":
        for suffix in _COMPRESSED:
            name = name.removesuffix(suffix)
        name = f"{name.removesuffix('.tar')}.tar"
    return storage.join(folder, name)


def _mirror_file(
    copy: Copy, folder: str, dataset: Dataset, checksums: Mapping[str, str], scratch: str | None
) -> dict[str, Checksum]:
    """Copy, check and unpack one file; return the checksums of what is read in the end, by URL."""
    name, num_bytes = copy.file.name, copy.file.num_bytes
    done = num_bytes - sum(map(copy.part_size, copy.missing()))
    with ByteProgress(f"copying {name}", num_bytes, done) as progress:
        copying.fetch(copy, progress)
    with ByteProgress(f"checking {name}", num_bytes) as progress:
        parts = copying.check(copy, checksums.get(name), progress)
    output = _output(folder, dataset, copy.file)
    if dataset.layout == "sqlite":
        with ByteProgress(f"making Parquet of {name}", 2 * num_bytes) as progress:
            table = dataset.table or ""
            return unpacking.sqlite_to_parquet(copy, table, output, scratch, progress)
    if _stays(copy.file):
        return {copy.part_url(number): part for number, part in enumerate(parts)}
    with ByteProgress(f"decompressing {name}", num_bytes) as progress:
        return unpacking.gunzip(copy, output, progress)


def _check_room(copies: Sequence[Copy], folder: str, dataset: Dataset, scratch: str | None) -> None:
    """Compare what is still to be written, at the least, with the room on local disks.

    Raises:
        EvenmixError: it does not fit.
    """
    fs, path = storage.filesystem(folder)
    needs: list[tuple[Path, int]] = []
    for copy in copies:
        num_bytes = copy.file.num_bytes
        if isinstance(fs, LocalFileSystem):
            still = sum(map(copy.part_size, copy.missing()))
            if dataset.layout == "sqlite":
                still += num_bytes // _PARQUET_SHARE
            elif not _stays(copy.file):
                there = copying.part_sizes(_output(folder, dataset, copy.file))
                still += max(num_bytes - sum(there.values()), 0)
            needs.append((Path(path), still))
        if dataset.layout == "sqlite":
            needs.append((Path(scratch or tempfile.gettempdir()), num_bytes))
    disks: dict[int, tuple[Path, int]] = {}
    for place, num_bytes in needs:
        existing = next(p for p in (place, *place.absolute().parents) if p.exists())
        device = existing.stat().st_dev
        disks[device] = (existing, num_bytes + disks.get(device, (existing, 0))[1])
    for existing, num_bytes in disks.values():
        free = shutil.disk_usage(existing).free
        if num_bytes > free:
            raise EvenmixError(
                f"at least {num_bytes:,} bytes are still to be written and {existing} has room for "
                f"{free:,}; free some space, or choose another disk with --root or --scratch"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix mirror`."""
    parser.add_argument("dataset", help="a dataset of the catalogue, or of the recipe")
    parser.add_argument("--root", help="the corpus root R, a path or any fsspec URL")
    parser.add_argument("--recipe", help="take the dataset, and R, from this recipe")
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="local folder with room for a SQLite file (default: the system's temporary folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Run `evenmix mirror`."""
    root, dataset, checksums = _chosen(args)
    files = mirror(root, args.dataset, dataset, checksums, scratch=args.scratch)
    num_bytes = sum(file.num_bytes for file in files.values())
    console.print(
        f"mirror: {storage.join(root, SOURCES, args.dataset)} is complete: {decimal(num_bytes)}, "
        f"files to read: {len(files):,}",
        soft_wrap=True,
    )
    return 0


def _chosen(args: argparse.Namespace) -> tuple[str, Dataset, Mapping[str, str]]:
    """Return the root, the dataset, and the known checksums of its files.

    Raises:
        EvenmixError: there is no such dataset, or nothing says what the root is.
    """
    entry = CATALOG.get(args.dataset)
    if args.recipe is None:
        if args.root is None:
            raise EvenmixError("name the corpus root with --root, or a recipe with --recipe")
        if entry is None:
            hint = did_you_mean(args.dataset, CATALOG, f"it has {', '.join(CATALOG)}")
            raise EvenmixError(f"the catalogue has no dataset {args.dataset}{hint}")
        return args.root, entry.dataset, entry.checksums
    recipe = load_recipe(args.recipe, {"root": args.root})
    if args.dataset not in recipe.datasets:
        hint = did_you_mean(args.dataset, recipe.datasets, f"it has {', '.join(recipe.datasets)}")
        raise EvenmixError(f"{args.recipe} has no dataset {args.dataset}{hint}")
    dataset = recipe.datasets[args.dataset]
    known = entry is not None and entry.dataset.source == dataset.source
    return recipe.root, dataset, entry.checksums if entry and known else {}
