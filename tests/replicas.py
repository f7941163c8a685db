"""Miniatures of the twelve public datasets in their real layouts: names, columns and quirks.

Their pictures are crops of scikit-image's photographs (public domain or CC0) and drawn text. A
repository has the commit that the catalogue pins, and a later one with a file more, so that what
is read shows which one was.
"""

import hashlib
import io
import json
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from PIL import Image, ImageDraw

from pipeline.catalog import CATALOG
from tests.hub import Hub, Page, Repository
from tests.pictures import save

HEAD = "0123456789abcdef0123456789abcdef01234567"
"""The newest commit of every repository."""

PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Files = dict[str, bytes]


def photograph(
    number: int, image_format: str = "JPEG", width: int = 128, height: int = 96
) -> bytes:
    """Return a crop of a photograph, another for each number."""
    whole = _whole_photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)])
    left, top = 41 * number % (whole.width - width), 29 * number % (whole.height - height)
    crop = whole.crop((left, top, left + width, top + height))
    return save(crop, image_format, quality=90)


@cache
def _whole_photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


def drawn_text(text: str) -> bytes:
    image = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(image).text((8, 40), text, fill="black")
    return save(image, "PNG")


def publish(hub: Hub) -> None:
    """Put all twelve on a server: nine on its Hub, three as pages of other hosts."""
    add_repository(hub, "fluxreason", fluxreason(), "Text/fluxdb-text-00001-of-00001.parquet")
    add_repository(hub, "gptedit", gptedit(), "data/part_178/train-00000.parquet")
    add_repository(hub, "imagenet22k", imagenet22k(), "README.md")
    add_repository(hub, "megalith10m", megalith10m(hub), "data/megalith-00002-of-00010.parquet")
    add_repository(hub, "midjourneyv6", midjourneyv6(), "train_002.parquet")
    add_repository(hub, "pexels", pexels(), "README.md", gated=True)
    add_repository(hub, "redcaps", redcaps(hub), "README.md")
    add_repository(hub, "rendered_text", rendered_text(), "remaining/000001.tar")
    add_repository(hub, "textatlas", textatlas(), "CoverBook/train-00001-of-00001.parquet")
    hub.pages["/2024/train.tar.gz"] = Page(inaturalist())
    hub.pages["/places365/train_large_places365challenge.tar"] = Page(places_nested())
    hub.pages["/tools/etc/yfcc100m_dataset.sql"] = Page(yfcc(hub))


def add_repository(hub: Hub, name: str, files: Files, later_file: str, gated: bool = False) -> None:
    """Publish a repository; the file that comes later is no archive or table at all."""
    source = CATALOG[name].dataset
    repo = "/".join(source.source.removeprefix("hf://datasets/").split("/")[:2])
    later = {**files, later_file: b"added later"}
    commits = {HEAD: later} | ({source.revision: files} if source.revision else {})
    hub.repositories[repo] = Repository(commits, gated)


# On the Hub, as Parquet


def fluxreason() -> Files:
    """Four folders; image.path and all captions but one may be null; one picture is cut off."""
    files: Files = {}
    for folder in ("Aesthetics-Part01", "Aesthetics-Part02", "Imaginative", "Text"):
        rows = []
        for number in range(6):
            picture = photograph(number + 10 * len(files), width=96)
            if folder == "Imaginative" and number == 4:
                picture = picture[: len(picture) // 2]
            rows.append(
                {
                    "id": f"{folder.lower()}-{number:08}",
                    "image": {"bytes": picture, "path": None},
                    "caption_original": f"an original {number}" if number % 2 else None,
                    "caption_detail": f"A detailed description, number {number} of {folder}.",
                    "caption_detail_cn": f"描述 {number}",
                    "bool_caption_original": number % 3 == 0,
                    "score_clarity": 9,
                }
            )
        files[f"{folder}/fluxdb-{folder.lower()}-00000-of-00001.parquet"] = _parquet(rows)
    return files


def gptedit() -> Files:
    """Upload parts; each row has the picture before and after, and what was to be changed."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"hqedit_{number}",
            "input": {"bytes": photograph(number), "path": None},
            "instruction": f"Make it warmer, step {number}.",
            "output": {"bytes": photograph(number + 50), "path": f"{number}.jpg"},
        }
        for number in range(12)
    ]
    rows[7]["output"] = None
    return {
        "data/part_001/train-00000.parquet": _parquet(rows[:8]),
        "data/part_002/train-00000.parquet": _parquet(rows[8:]),
    }


def midjourneyv6() -> Files:
    """Four rows an id, with other pictures and captions; the image has bytes and no path."""
    image = pa.struct([("bytes", pa.binary())])
    rows = [
        {
            "id": 900_000 + number // 4,
            "prompt": f"a prompt {number // 4}",
            "llava": f"llava {number}",
            "llava_status": "ok",
            "gemini": None if number == 3 else f"gemini {number}",
            "gemini_status": "failed" if number == 3 else "ok",
            "qwen3": f"qwen3 {number}",
            "qwen3_status": "ok",
            "image": {"bytes": photograph(number + 100, "PNG", width=96)},
        }
        for number in range(24)
    ]
    return {f"train_{part:03}.parquet": _parquet(rows[part * 12 :][:12], image) for part in (0, 1)}


TEXTATLAS_SUBSETS = [subset.name for subset in CATALOG["textatlas"].subsets]


def textatlas() -> Files:
    """Ten subsets that use the same paths; one of them has a column more, one a null image."""
    files = {}
    for subset in TEXTATLAS_SUBSETS:
        rows: list[dict[str, Any]] = []
        for number in range(3):
            text = f"{subset} says {number}"
            row: dict[str, Any] = {
                "image": {"bytes": drawn_text(text), "path": None},
                "image_path": f"images/{number}.png",
                "annotation": f"The words '{text}' on white.",
            }
            if subset == "TextScenesHQ":
                row["raw_text"] = text
            rows.append(row)
        if subset == "StyledTextSynth":
            rows[1]["image"] = None
        files[f"{subset}/train-00000-of-00001.parquet"] = _parquet(rows)
    return files


# On the Hub, as WebDataset


def imagenet22k() -> Files:
    """Training and validation tars; a class beside each picture; one CMYK and one empty file."""
    pictures = [photograph(number + 200) for number in range(14)]
    pictures[3] = save(Image.open(io.BytesIO(pictures[3])).convert("CMYK"), "JPEG")
    pictures[11] = b""
    members = [
        (f"n0000{number % 3}475_{number}.{suffix}", content)
        for number, picture in enumerate(pictures)
        for suffix, content in (("cls", b"%d" % (number % 3)), ("jpg", picture))
    ]
    return {
        "imagenet22k-train-0000.tar": tar(members[:12]),
        "imagenet22k-train-0001.tar": tar(members[12:24]),
        "imagenet22k-validation-0000.tar": tar(members[24:]),
    }


def pexels() -> Files:
    """WebP and JSON in three splits, behind a gate."""
    files = {"meta.json": json.dumps({"exist_ids": list(range(1_000, 1_018))}).encode()}
    for part, split in enumerate(("train", "train", "val", "test")):
        members = []
        for number in range(1_000 + 6 * part, 1_006 + 6 * part):
            about = {"id": number, "width": 96, "height": 96}
            members.append((f"{number}.webp", photograph(number, "WEBP", width=96)))
            members.append((f"{number}.json", json.dumps(about).encode()))
        files[f"{split}/{part:05}.tar"] = tar(members)
    return files


def rendered_text() -> Files:
    """Tars at the root and more below remaining; the lines of text in the JSON."""
    files = {}
    for part, name in enumerate(("000000.tar", "000001.tar", "remaining/000000.tar")):
        members = []
        for number in range(4 * part, 4 * part + 4):
            lines = [f"line {number}", "of text"]
            about = {"ocr_annotation": {"text": lines, "bb_relative": [[0, 0], [1, 1]]}}
            members.append((f"{number:08}.png", drawn_text("\n".join(lines))))
            members.append((f"{number:08}.json", json.dumps(about).encode()))
        files[name] = tar(members)
    return files


# On the Hub, as lists of URLs


def megalith10m(hub: Hub) -> Files:
    """Links to Flickr, of which one is dead, one was removed and one does not want this use."""
    rows = []
    for number in range(12):
        path = f"/live.staticflickr.com/65535/{number}_b.jpg"
        hub.pages[path] = Page(photograph(number + 300))
        rows.append(
            {
                "url": f"{hub.url}{path}",
                "url_highres": f"{hub.url}{path.replace('_b', '_o')}",
                "url_source": f"https://www.flickr.com/photos/someone/{number}/",
            }
        )
    hub.pages["/live.staticflickr.com/65535/4_b.jpg"] = Page(b"gone", 410)
    del hub.pages["/live.staticflickr.com/65535/7_b.jpg"]
    page = hub.pages["/live.staticflickr.com/65535/9_b.jpg"]
    hub.pages["/live.staticflickr.com/65535/9_b.jpg"] = Page(
        page.body, headers={"X-Robots-Tag": "noai, noimageai"}
    )
    return {
        "data/megalith-00000-of-00010.parquet": _parquet(rows[:6]),
        "data/megalith-00001-of-00010.parquet": _parquet(rows[6:]),
    }


def redcaps(hub: Hub) -> Files:
    """A zip of one JSON for each subreddit and year; Imgur sends what is gone to removed.png."""
    removed = "/i.imgur.com/removed.png"
    hub.pages[removed] = Page(photograph(0, "PNG"))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as members:
        for subreddit, year in (("cats", 2017), ("itookapicture", 2019)):
            annotations = []
            for number in range(8):
                image_id = f"{subreddit[0]}{year}{number}"
                path = f"/i.imgur.com/{image_id}.jpg"
                hub.pages[path] = Page(photograph(number + year))
                annotations.append(
                    {
                        "image_id": image_id,
                        "author": "someone",
                        "url": f"{hub.url}{path}",
                        "raw_caption": f"My {subreddit.upper()} #{number}!!",
                        "caption": f"my {subreddit} {number}",
                        "subreddit": subreddit,
                        "score": number,
                        "created_utc": 1_500_000_000 + number,
                        "permalink": f"/r/{subreddit}/comments/{image_id}/",
                        "crosspost_parents": None,
                    }
                )
            members.writestr(
                f"annotations/{subreddit}_{year}.json",
                json.dumps({"info": {"version": "1.0"}, "annotations": annotations}),
            )
    hub.pages["/i.imgur.com/c20175.jpg"] = Page(status=302, headers={"Location": removed})
    hub.pages["/i.imgur.com/i20192.jpg"] = Page(b"<html>moved to somewhere</html>")
    return {"data/redcaps_v1.0_annotations.zip": archive.getvalue()}


# On other hosts


INATURALIST_FOLDERS = [
    "04686_Animalia_Chordata_Aves_Piciformes_Picidae_Picus_viridis",
    "09999_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
]


def inaturalist() -> bytes:
    """A compressed tar of folders of files that are named by a uuid."""
    members = [
        (f"train/{folder}/{inaturalist_uuid(folder, number)}.jpg", photograph(number + 500))
        for folder in INATURALIST_FOLDERS
        for number in range(8)
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        _add_folder(archive, "train")
        for name, picture in members:
            _add(archive, name, picture)
    return buffer.getvalue()


def inaturalist_uuid(folder: str, number: int) -> str:
    digits = hashlib.md5(f"{folder}{number}".encode()).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


PLACES = {
    "a/abbey": 3,
    "b/bow_window/indoor": 2,
    "n/natural_history_museum": 2,
    "s/swimming_pool/indoor": 2,
    "s/swimming_pool/outdoor": 2,
}
"""Folders of Places365-challenge, and how many pictures each has in the miniature."""


def places_nested() -> bytes:
    """The tar as its kit describes it: a tar for each first letter, which repeats the letter."""
    letters = sorted({folder[0] for folder in PLACES})
    inner = {
        letter: tar([member for member in _places_members() if member[0].startswith(letter)])
        for letter in letters
    }
    return tar((f"{letter}.tar", data) for letter, data in inner.items())


def places_direct() -> bytes:
    """The tar as another reader has found it: the pictures themselves, below one folder."""
    return tar((f"data_large/{name}", picture) for name, picture in _places_members())


def _places_members() -> Iterable[tuple[str, bytes]]:
    for folder, count in PLACES.items():
        for number in range(count):
            yield f"{folder}/{number:08}.jpg", photograph(number + len(folder) * 10)


YFCC_RECORDS = 16
YFCC_FAILURES = {3: "http_error", 6: "placeholder", 9: "not_an_image", 12: "placeholder"}
"""Rows of the YFCC100M miniature whose pictures do not come, and why."""


def yfcc(hub: Hub) -> bytes:
    """A SQLite database, and pictures under the hashes of their Flickr URLs.

    Of those missing the bucket says so in XML, or has Flickr's placeholder, or less than a picture.
    """
    rows = []
    for number in range(YFCC_RECORDS):
        photo = 6_985_418_911 + number
        url = f"http://farm8.staticflickr.com/7205/{photo}_df7747990d.jpg"
        rows.append(
            {
                "photoid": photo,
                "uid": "someone@N00",
                "title": f"IMG+{number}",
                "description": f"A+description+{number}" if number % 2 else "",
                "usertags": "tag,another",
                "downloadurl": url,
                "licensename": "Attribution-NonCommercial License",
                "licenseurl": "http://creativecommons.org/licenses/by-nc/2.0/",
                "marker": 1 if number == 15 else 0,
            }
        )
        hub.pages[f"/data/images/{yfcc_path(url)}.jpg"] = Page(
            photograph(number + 600, width=256, height=192)
        )
    missing = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
    answers = {
        3: Page(missing, 403),
        6: Page(photograph(600, width=64).ljust(9_218, b"\0")),
        9: Page(missing),
        12: Page(photograph(603, width=64, height=64)),
    }
    for number, page in answers.items():
        hub.pages[f"/data/images/{yfcc_path(str(rows[number]['downloadurl']))}.jpg"] = page
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "yfcc100m_dataset.sql"
        columns = ", ".join(rows[0])
        with sqlite3.connect(path) as database:
            database.execute(f"CREATE TABLE yfcc100m_dataset ({columns}, PRIMARY KEY (photoid))")
            database.executemany(
                f"INSERT INTO yfcc100m_dataset VALUES ({', '.join('?' for _ in rows[0])})",
                [list(row.values()) for row in rows],
            )
        database.close()
        return path.read_bytes()


def yfcc_path(url: str) -> str:
    """Name a picture in the bucket: each byte of the MD5 in hex, that below 16 as one digit."""
    name = "".join(f"{byte:x}" for byte in hashlib.md5(url.encode()).digest())
    return f"{name[:3]}/{name[3:6]}/{name}"


# Files


def tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            _add(archive, name, data)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _add_folder(archive: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    archive.addfile(info)


def _parquet(rows: list[dict[str, Any]], image: pa.DataType = IMAGE) -> bytes:
    table = pa.Table.from_pylist(rows)
    for place, name in enumerate(table.column_names):
        if pa.types.is_struct(table.schema.field(name).type):
            pictures: list[Mapping[str, Any] | None] = [row[name] for row in rows]
            table = table.set_column(place, name, pa.array(pictures, image))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    return bytes(sink.getvalue().to_pybytes())
