"""`evenmix verify`: recount a corpus from its files, and check every one of them.

Nothing is believed but the bytes: each tar is read, its members are counted and its checksums are
compared with the receipt; each table is hashed; the sums must give ``stage.json`` and obey the
conservation law. Files that belong to no finished work are reported too.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from pipeline import images, storage
from pipeline.errors import EvenmixError
from pipeline.images import Limits
from pipeline.progress import console, counts_table
from pipeline.reasons import PictureError
from pipeline.receipts import Checksum, Counts, Receipt, checksum, read_receipt, table_digest, total
from pipeline.stage import SUMMARY, Summary

MANIFEST = "mixture.json"


@dataclass(frozen=True)
class Audit:
    """What a shard really holds: the counts that its files give, and what is wrong with them."""

    counts: Counts
    findings: list[str]


def verify(root: str, deep: bool) -> tuple[dict[str, Counts], list[str]]:
    """Check all finished work below a root; ``deep`` also decodes every picture.

    Returns the recounted sums of each folder with a ``stage.json``, and what is wrong, a line each
    that begins with the URL of the file.
    """
    files = {file.name for file in storage.list_files(root)}
    folders = sorted(name.rpartition("/")[0] for name in files if name.endswith(f"/{SUMMARY}"))
    recounted: dict[str, Counts] = {}
    findings: list[str] = []
    explained = {name for name in files if name.endswith((f"/{SUMMARY}", f"/{MANIFEST}"))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for folder in folders:
            url = storage.join(root, folder)
            try:
                summary = Summary.from_json(storage.read_bytes(storage.join(url, SUMMARY)))
            except (ValueError, KeyError, TypeError) as error:
                findings.append(f"{url}/{SUMMARY}: is damaged: {error!r}")
                continue
            audits = list(pool.map(partial(_audit_shard, url, summary, deep), summary.items))
            findings += [finding for audit in audits for finding in audit.findings]
            recounted[folder] = total(audit.counts for audit in audits)
            if recounted[folder] != summary.counts:
                findings.append(
                    f"{url}/{SUMMARY}: its sums {summary.counts} are not those of its shards, "
                    f"{recounted[folder]}"
                )
            explained |= {
                f"{folder}/{shard}{suffix}"
                for shard in summary.items
                for suffix in (".parquet", ".tar", ".rejected.parquet")
            }
    for name in sorted(files):
        if name.endswith(f"/{MANIFEST}"):
            findings += _check_manifest(storage.join(root, name))
    findings += [
        f"{storage.join(root, name)}: belongs to no finished work; start its stage again"
        for name in sorted(files - explained)
    ]
    return recounted, findings


def _audit_shard(folder: str, summary: Summary, deep: bool, shard: str) -> Audit:
    url = storage.join(folder, f"{shard}.parquet")
    try:
        receipt = read_receipt(url)
        table = storage.read_parquet(url)
    except EvenmixError as error:
        return Audit(Counts(), [str(error)])
    findings = list(_check_commit(url, receipt, summary.items[shard], table))
    counts = receipt.counts
    if receipt.tar is not None:
        try:
            tar, tar_url = _read_published(folder, f"{shard}.tar", receipt.tar, findings)
            pictures, tar_findings = _recount_tar(tar_url, tar, table, deep)
            findings += tar_findings
            reasons: Counter[str] = Counter()
            if receipt.rejected is not None:
                name = f"{shard}.rejected.parquet"
                _, rejected_url = _read_published(folder, name, receipt.rejected, findings)
                reasons.update(storage.read_parquet(rejected_url, ["reason"])["reason"].to_pylist())
        except EvenmixError as error:
            return Audit(Counts(), [*findings, str(error)])
        counts = Counts(pictures + reasons.total(), pictures, dict(sorted(reasons.items())))
        if counts != receipt.counts:
            findings.append(f"{tar_url}: holds {counts}, but its receipt says {receipt.counts}")
    if not counts.is_conserved():
        findings.append(f"{url}: in is not out + rejected: {counts}")
    return Audit(counts, findings)


def _check_manifest(url: str) -> Iterator[str]:
    """Compare what a mixture's manifest says of its shards with their receipts."""
    folder = url.rpartition("/")[0]
    try:
        datasets = json.loads(storage.read_bytes(url))["datasets"]
        shards = [
            s for d in datasets for split in ("train", "validation") for s in d[split]["shards"]
        ]
        for shard in shards:
            receipt = read_receipt(
                storage.join(folder, shard["name"].removesuffix(".tar") + ".parquet")
            )
            published = receipt.tar and (receipt.tar.sha256, receipt.tar.num_bytes)
            if published != (shard["sha256"], shard["bytes"]):
                yield f"{url}: {shard['name']} is not the shard that was published"
            if receipt.counts.records_out != shard["num_samples"]:
                yield f"{url}: {shard['name']} has {receipt.counts.records_out} samples"
    except (EvenmixError, ValueError, KeyError, TypeError) as error:
        yield f"{url}: {error}"


def _check_commit(
    url: str, receipt: Receipt, item: dict[str, object], table: pa.Table
) -> Iterator[str]:
    if table_digest(table) != receipt.digest:
        yield f"{url}: its rows are not those that were published"
    if (receipt.fingerprint, receipt.digest) != (item["fingerprint"], item["digest"]):
        yield f"{url}: is not the file that {SUMMARY} was written for"


def _read_published(
    folder: str, name: str, expected: Checksum, findings: list[str]
) -> tuple[bytes, str]:
    """Read a file beside a commit; add to ``findings`` if its bytes are not those expected."""
    url = storage.join(folder, name)
    data = storage.read_bytes(url)
    if checksum([data]) != expected:
        findings.append(f"{url}: its bytes are not those that were published")
    return data, url


def _recount_tar(url: str, data: bytes, table: pa.Table, deep: bool) -> tuple[int, list[str]]:
    """Count the pictures of a tar, and compare their order and bytes with the table's rows."""
    findings = []
    pictures: list[str] = []
    hashes = table["sha256"].to_pylist() if "sha256" in table.column_names else None
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "json":
                    continue
                picture = data[member.offset_data : member.offset_data + member.size]
                place = len(pictures)
                pictures.append(key)
                expected = hashes[place] if hashes and place < len(hashes) else None
                if expected and hashlib.sha256(picture).hexdigest() != expected:
                    findings.append(f"{url}: picture {member.name} has changed")
                if deep:
                    findings += _decode(f"{url}: picture {member.name}", picture)
    except tarfile.TarError as error:
        findings.append(f"{url}: cannot be read as a tar: {error}")
    if pictures != table["key"].to_pylist():
        findings.append(f"{url}: its pictures are not those of its index")
    return len(pictures), findings


def _decode(place: str, picture: bytes) -> list[str]:
    try:
        header = images.probe(picture)
        images.decode(picture, Limits(1, header.width * header.height, len(picture)))
    except PictureError as error:
        return [f"{place} cannot be decoded: {error}"]
    return []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evenmix verify`."""
    parser.add_argument("root", help="the corpus root R, a path or any fsspec URL")
    parser.add_argument("--deep", action="store_true", help="decode every picture as well")


def run(args: argparse.Namespace) -> int:
    """Run `evenmix verify`."""
    recounted, findings = verify(args.root, args.deep)
    if not recounted:
        raise EvenmixError(f"there is no finished work below {args.root}; is it a corpus root?")
    console.print(counts_table("verify: recounted from the files", recounted))
    if findings:
        lines = "\n  ".join(findings)
        raise EvenmixError(
            f"{len(findings)} findings below {args.root}:\n  {lines}\nRemove the folders concerned "
            "and those made from them, and build again."
        )
    console.print(f"verify: {len(recounted)} folders are as they were published", soft_wrap=True)
    return 0
