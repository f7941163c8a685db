"""Receipts: what a published work item says of itself, and the sums that must come out.

A receipt is JSON in the footer of the item's Parquet file, the file whose appearance commits the
item. It carries the fingerprint by which a later run recognises finished work, the counts of the
conservation law (in = out + rejected), and checksums of all that was published with it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.errors import EvenmixError

METADATA_KEY = "evenmix.receipt"


@dataclass(frozen=True)
class Counts:
    """Records that went in, came out, and were turned away, by reason.

    ``retried`` are those among ``records_in`` that an earlier generation had turned away, by its
    reason: all of them in the counts of a retry, none elsewhere.
    """

    records_in: int = 0
    records_out: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    retried: dict[str, int] = field(default_factory=dict)

    def is_conserved(self) -> bool:
        """Tell whether in = out + the sum of rejections."""
        return self.records_in == self.records_out + sum(self.rejected.values())

    def without_retried(self) -> "Counts":
        """Return the counts of all generations of a dataset with each record counted once.

        A record that was tried again counts with what became of it in the end.
        """
        rejected = Counter(self.rejected)
        rejected.subtract(self.retried)
        return Counts(
            self.records_in - sum(self.retried.values()),
            self.records_out,
            {reason: n for reason, n in sorted(rejected.items()) if n},
        )


def total(counts: Iterable[Counts]) -> Counts:
    """Add up counts, reason by reason."""
    records_in = records_out = 0
    rejected: Counter[str] = Counter()
    retried: Counter[str] = Counter()
    for count in counts:
        records_in += count.records_in
        records_out += count.records_out
        rejected.update(count.rejected)
        retried.update(count.retried)
    return Counts(
        records_in, records_out, dict(sorted(rejected.items())), dict(sorted(retried.items()))
    )


@dataclass(frozen=True)
class Checksum:
    """Size and checksums (hex) of a file: CRC-32C is what object stores keep, sha256 for people."""

    num_bytes: int
    crc32c: str
    sha256: str


def checksum(chunks: Iterable[bytes]) -> Checksum:
    """Return size and checksums of a file given in chunks."""
    num_bytes, crc, sha256 = 0, google_crc32c.Checksum(), hashlib.sha256()
    for chunk in chunks:
        num_bytes += len(chunk)
        crc.update(chunk)
        sha256.update(chunk)
    return Checksum(num_bytes, crc.hexdigest().decode(), sha256.hexdigest())


@dataclass(frozen=True)
class Receipt:
    """What the footer of a committed item holds.

    ``identity`` is everything that decides the item's content (stage, version of its logic,
    configuration, identities of the inputs); ``digest`` is the sha256 of the table's rows, by
    which later stages identify this item as their input. ``tar`` and ``rejected`` are the files
    that were published beside the table, where there are any, and ``files`` further ones by name.
    """

    identity: dict[str, Any]
    counts: Counts
    digest: str
    tar: Checksum | None = None
    rejected: Checksum | None = None
    files: dict[str, Checksum] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    def to_json(self) -> str:
        """Serialise; equal receipts give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Receipt":
        """Parse what :meth:`to_json` wrote."""
        fields = json.loads(text)
        fields["counts"] = Counts(**fields["counts"])
        for name in ("tar", "rejected"):
            fields[name] = fields[name] and Checksum(**fields[name])
        # Receipts of earlier versions say nothing of such files: there were none.
        files = fields.get("files", {})
        fields["files"] = {name: Checksum(**file) for name, file in files.items()}
        return cls(**fields)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON document, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def table_digest(table: pa.Table) -> str:
    """Return the sha256 of a table's column names and values.

    It does not depend on how Arrow holds them (chunks, offsets, what lies under a null), so a table
    has the same digest before it is written and after it is read.
    """
    hasher = hashlib.sha256()
    for name in table.column_names:
        hasher.update(f"{name}\0{table.num_rows}\0".encode())
        _hash_values(hasher, table[name].combine_chunks())
    return hasher.hexdigest()


_BYTES = (pa.types.is_string, pa.types.is_binary, pa.types.is_fixed_size_binary)


def _hash_values(hasher: "hashlib._Hash", values: pa.Array) -> None:
    hasher.update(np.packbits(values.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(values.type):
        for child in values.flatten():
            _hash_values(hasher, child)
    elif pa.types.is_nested(values.type):
        lengths = pc.list_value_length(values).drop_null()
        hasher.update(lengths.cast(pa.int64()).to_numpy().tobytes())
        _hash_values(hasher, values.flatten())
    elif any(is_type(values.type) for is_type in _BYTES):
        present = values.drop_null().cast(pa.binary())
        hasher.update(pc.binary_length(present).cast(pa.int64()).to_numpy().tobytes())
        hasher.update(b"".join(present.to_pylist()))
    else:
        numbers = values.drop_null().to_numpy(zero_copy_only=False)
        if numbers.dtype == object and len(numbers):
            raise TypeError(f"a digest of {values.type} would be one of addresses in memory")
        hasher.update(numbers.tobytes())


def read_receipt(url: str) -> Receipt:
    """Read the receipt from the footer of a committed item.

    Raises:
        EvenmixError: the file is damaged or carries no receipt.
    """
    metadata = storage.parquet_metadata(url)
    if METADATA_KEY not in metadata:
        raise EvenmixError(
            f"{url} was not written by evenmix (no receipt in its footer); move it away"
        )
    try:
        return Receipt.from_json(metadata[METADATA_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise EvenmixError(
            f"{url} has a receipt that this version cannot read ({error}); read it with the "
            "version that wrote it, or move it away"
        ) from error


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """List where two identities differ, one line a place, such as ``config.seed: 0 -> 1``."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else text[:77] + "..."
