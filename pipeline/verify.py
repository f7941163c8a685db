"""`evenmix verify`: recount a corpus from its files, and check every one of them.

Nothing is believed but the bytes: each tar is read, its members are counted and its checksums are
compared with the receipt; each table is hashed; the sums must give ``stage.json`` and obey the
conservation law. Mirrored sources are compared with ``mirror.json``. Files that belong to no
finished work are reported too.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from pipeline import images, storage
from pipeline.errors import EvenmixError
from pipeline.images import Limits
from pipeline.mirror import verify_mirror
from pipeline.mirror_manifest import MANIFEST as MIRROR_MANIFEST
from pipeline.progress import console, counts_table
from pipeline.reasons import PictureError
from pipeline.receipts import Checksum, Counts, Receipt, checksum, read_receipt, table_digest, total
from pipeline.records import ATTRIBUTES, EXCLUSIONS, NOTES, SOURCES
from pipeline.stage import OBSERVED_SUFFIX, REJECTED_SUFFIX
from pipeline.summary import SUMMARY, Summary, previous_generation, summarise

MANIFEST = "mixture.json"
TFRECORDS = "tfrecords/"
TFDS_METADATA = ("features.json", "dataset_info.json")


@dataclass(frozen=True)
class Audit:
    """What a shard really holds: the counts that its files give, and what is wrong with them.

    ``receipt`` is None if it cannot be read.
    """

    counts: Counts
    findings: list[str]
    receipt: Receipt | None

    def suffixes(self) -> Iterator[str]:
        """Yield how the names of the shard's files end; all that may be, without a receipt."""
        yield ".parquet"
        if self.receipt is None or self.receipt.tar:
            yield ".tar"
        if self.receipt is None or self.receipt.rejected:
            yield REJECTED_SUFFIX
        yield OBSERVED_SUFFIX

    def named_files(self) -> Iterator[str]:
        """Yield the names of the shard's files whose names do not follow from its own."""
        if self.receipt is not None:
            yield from self.receipt.files


def verify(root: str, deep: bool) -> tuple[dict[str, Counts], list[str]]:
    """Check all finished work below a root; ``deep`` also decodes every picture.

    Returns the recounted sums of each folder with a ``stage.json``, and what is wrong, a line each
    that begins with the URL of the file.
    """
    files = {file.name for file in storage.list_files(root)}
    summaries = sorted(name for name in files if SUMMARY.fullmatch(name.rpartition("/")[2]))
    folders = {name.rpartition("/")[0] for name in summaries}
    counts: dict[str, list[Counts]] = {}
    findings: list[str] = []
    explained = set(summaries)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in summaries:
            folder = name.rpartition("/")[0]
            url, summary_url = storage.join(root, folder), storage.join(root, name)
            published = storage.read_bytes(summary_url)
            try:
                summary = Summary.from_json(published)
            except (ValueError, KeyError, TypeError) as error:
                findings.append(f"{summary_url}: is damaged: {error!r}")
                continue
            shards = list(summary.items)
            audits = dict(
                zip(shards, pool.map(partial(_audit_shard, url, deep), shards), strict=True)
            )
            findings += [finding for audit in audits.values() for finding in audit.findings]
            counts.setdefault(folder, []).append(total(audit.counts for audit in audits.values()))
            findings += _check_summary(summary_url, published, summary, audits, counts[folder][-1])
            explained |= {
                f"{folder}/{shard}{suffix}"
                for shard, audit in audits.items()
                for suffix in audit.suffixes()
            }
            explained |= {
                f"{folder}/{name}" for audit in audits.values() for name in audit.named_files()
            }
            if folder.startswith(TFRECORDS):
                explained |= {f"{folder}/{name}" for name in TFDS_METADATA}
                findings += _check_dataset_info(url, audits)
    mixtures = {folder.rpartition("/")[0] for folder in folders if folder.startswith("mixtures/")}
    for mixture in sorted(mixtures):
        explained.add(f"{mixture}/{MANIFEST}")
        findings += _check_manifest(storage.join(root, mixture, MANIFEST))
    for name in sorted(files):
        if name.startswith(f"{SOURCES}/") and name.endswith(f"/{MIRROR_MANIFEST}"):
            findings += verify_mirror(storage.join(root, name.removesuffix(f"/{MIRROR_MANIFEST}")))
    findings += [
        f"{storage.join(root, name)}: belongs to no finished work; start its stage again"
        for name in sorted(files - explained)
        if not name.startswith((f"{SOURCES}/", f"{EXCLUSIONS}/", f"{NOTES}/", f"{ATTRIBUTES}/"))
    ]
    recounted = {folder: total(parts).without_retried() for folder, parts in counts.items()}
    return recounted, findings


def _check_summary(
    url: str, published: bytes, summary: Summary, audits: Mapping[str, Audit], recounted: Counts
) -> Iterator[str]:
    """Compare a summary with the sums of its shards and with what their receipts give."""
    folder, _, name = url.rpartition("/")
    if recounted != summary.counts:
        yield f"{url}: its sums {summary.counts} are not those of its shards, {recounted}"
    receipts = {shard: audit.receipt for shard, audit in audits.items() if audit.receipt}
    stage = next((str(r.identity["stage"]) for r in receipts.values()), summary.stage)
    expected = summarise(stage, folder.rpartition("/")[2], receipts)
    others = [shard for shard in receipts if expected.items[shard] != summary.items[shard]]
    for shard in others:
        yield f"{folder}/{shard}.parquet: is not the file that {name} was written for"
    if not others and receipts.keys() == audits.keys() and expected.to_json() != published:
        yield f"{url}: is not what the receipts of its shards give"


def _audit_shard(folder: str, deep: bool, shard: str) -> Audit:
    url = storage.join(folder, f"{shard}.parquet")
    receipt = None
    try:
        receipt = read_receipt(url)
        table = storage.read_parquet(url)
    except EvenmixError as error:
        return Audit(Counts(), [str(error)], receipt)
    findings = []
    if table_digest(table) != receipt.digest:
        findings.append(f"{url}: its rows are not those that were published")
    counts = receipt.counts
    for name, expected in receipt.files.items():
        try:
            _read_published(folder, name, expected, findings)
        except EvenmixError as error:
            findings.append(str(error))
    if receipt.tar is not None:
        try:
            tar, tar_url = _read_published(folder, f"{shard}.tar", receipt.tar, findings)
            pictures, tar_findings = _recount_tar(tar_url, tar, table, deep)
            findings += tar_findings
            reasons: Counter[str] = Counter()
            if receipt.rejected is not None:
                name = f"{shard}{REJECTED_SUFFIX}"
                _, rejected_url = _read_published(folder, name, receipt.rejected, findings)
                reasons.update(storage.read_parquet(rejected_url, ["reason"])["reason"].to_pylist())
            retried = _recount_retried(folder, shard)
        except EvenmixError as error:
            return Audit(Counts(), [*findings, str(error)], receipt)
        counts = Counts(
            pictures + reasons.total(), pictures, dict(sorted(reasons.items())), retried
        )
        if counts != receipt.counts:
            findings.append(f"{tar_url}: holds {counts}, but its receipt says {receipt.counts}")
    if not counts.is_conserved():
        findings.append(f"{url}: in is not out + rejected: {counts}")
    return Audit(counts, findings, receipt)


def _recount_retried(folder: str, shard: str) -> dict[str, int]:
    """Count by reason what a shard tried again: all that its previous generation left for it."""
    previous = previous_generation(shard)
    if previous is None:
        return {}
    url = storage.join(folder, f"{previous}{REJECTED_SUFFIX}")
    rejected = storage.read_parquet(url, ["reason", "retryable"]).to_pylist()
    return dict(sorted(Counter(row["reason"] for row in rejected if row["retryable"]).items()))


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


def _check_dataset_info(folder: str, audits: Mapping[str, Audit]) -> Iterator[str]:
    """Compare what TFDS's metadata say of a folder's TFRecord files with their receipts."""
    url = storage.join(folder, TFDS_METADATA[-1])
    published = {
        name: audit.receipt.counts.records_out
        for audit in audits.values()
        if audit.receipt
        for name in audit.receipt.files
    }
    try:
        lengths = {
            split["name"]: split["shardLengths"]
            for split in json.loads(storage.read_bytes(url))["splits"]
        }
        described = {
            f"dataset-{split}.tfrecord-{number:05d}-of-{len(of_split):05d}": int(length)
            for split, of_split in lengths.items()
            for number, length in enumerate(of_split)
        }
    except (EvenmixError, ValueError, KeyError, TypeError) as error:
        yield f"{url}: {error}"
    else:
        if described != published:
            yield f"{url}: does not describe the files that were published"


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
            f"{len(findings)} findings below {args.root}:\n  {lines}\nUnless a line says "
            "otherwise, remove the folders concerned and those made from them, and build again."
        )
    console.print(f"verify: {len(recounted)} folders are as they were published", soft_wrap=True)
    return 0
