"""Little mixtures on disk, written as `evenmix mix` lays them out."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


@dataclass(frozen=True)
class Member:
    """A sample to write: its PNG bytes and its captions."""

    key: str
    png: bytes
    captions: Sequence[str]


def png(picture: np.ndarray) -> bytes:
    """Encode a picture (H, W, 3) uint8."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write_mixture(
    folder: Path,
    train: dict[str, list[Member]],
    *,
    validation: dict[str, list[Member]] | None = None,
    weights: dict[str, str] | None = None,
    resolution: int = 8,
    samples_per_shard: int = 100,
) -> str:
    """Write a mixture of equally weighted datasets (or ``weights``); return its folder."""
    datasets = []
    for name, members in train.items():
        held_out = (validation or {}).get(name, [])
        datasets.append(
            {
                "name": name,
                "weight": (weights or {}).get(name, str(Fraction(1, len(train)))),
                "weight_before_rounding": None,
                "licence": "CC0 1.0",
                "caption_sets": {"source": "1"},
                "train": _write_split(folder, name, "train", members, samples_per_shard),
                "validation": _write_split(folder, name, "validation", held_out, samples_per_shard),
            }
        )
    manifest = {
        "version": 2,
        "name": folder.name,
        "resolution": resolution,
        "crop": "square",
        "image_format": "png",
        "seed": 0,
        "datasets": datasets,
    }
    (folder / "mixture.json").write_text(json.dumps(manifest))
    return str(folder)


def _write_split(
    folder: Path, dataset: str, split: str, members: list[Member], samples_per_shard: int
) -> dict[str, object]:
    shards = []
    for first in range(0, len(members), samples_per_shard):
        name = f"{dataset}/{split}-{first // samples_per_shard:05d}"
        chunk = members[first : first + samples_per_shard]
        tar, index = _shard(dataset, chunk)
        path = folder / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar)
        pq.write_table(index, folder / f"{name}.parquet")
        shards.append(
            {
                "name": f"{name}.tar",
                "num_samples": len(chunk),
                "bytes": len(tar),
                "sha256": hashlib.sha256(tar).hexdigest(),
            }
        )
    return {"num_samples": len(members), "shards": shards}


def _shard(dataset: str, members: list[Member]) -> tuple[bytes, pa.Table]:
    file = io.BytesIO()
    rows = []
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            captions = [
                {"text": text, "caption_set": "source", "model": "source"}
                for text in member.captions
            ]
            record = {"key": member.key, "dataset": dataset, "captions": captions, "fields": {}}
            row: dict[str, object] = {"key": member.key}
            for kind, suffix, data in (
                ("image", "png", member.png),
                ("json", "json", json.dumps(record).encode()),
            ):
                info = tarfile.TarInfo(f"{member.key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                row |= {f"{kind}_offset": tar.offset - padded, f"{kind}_bytes": len(data)}
            rows.append(row)
    return file.getvalue(), pa.Table.from_pylist(rows)
