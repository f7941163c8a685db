"""The catalogue is shown as it is, and a check of it finds what differs and nothing else."""

import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.catalog import CATALOG, Entry
from pipeline.check_dataset import Finding, check
from pipeline.cli import main
from pipeline.dataset import Dataset
from pipeline.hub import resolve
from pipeline.recipe import Fetch
from tests import replicas
from tests.hub import TOKEN, Hub, Page, Repository, point_at, serve_hub

FETCH = Fetch(allow_private_addresses=True, attempts=1)
PLACES = "places365-challenge2016"
ELSEWHERE = {
    "inaturalist": "/2024/train.tar.gz",
    PLACES: "/places365/train_large_places365challenge.tar",
    "yfcc": "/tools/etc/yfcc100m_dataset.sql",
}


Command = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`evenmix datasets` as a function of its arguments: status, lines of stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, list[str], str]:
        status = main(["datasets", *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return run


# What is shown


def test_the_table_has_a_line_for_each_and_fits_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "datasets"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:] if line[:1].isalpha()] == list(CATALOG)
    (places,) = (line.split() for line in lines if line.startswith(PLACES))
    assert places == [
        PLACES, "8.0", "M", "511", "GB", "https", "tar", "no", "256-512", "ambiguous",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CATALOG)
def test_all_about_one_is_all_that_the_catalogue_knows(name: str, command: Command) -> None:
    entry = CATALOG[name]
    status, lines, _ = command(name)
    assert status == 0
    # Only what cannot be broken, such as a URL, is longer than a terminal is wide.
    assert all(len(line) <= 80 or len(line.split()) <= 2 for line in lines)
    text = " ".join(" ".join(lines).split())
    told = [
        entry.title,
        entry.home,
        entry.terms,
        entry.dataset.licence,
        entry.dataset.source,
        entry.dataset.id_rule or "",
        entry.join_note,
        f"{entry.in_i1.pictures:,}",
        f"{entry.in_i1.captioned:,}",
        entry.dataset.revision or "",
        *entry.checksums.values(),
        *entry.unverified,
        *entry.notes,
    ]
    assert [fact for fact in told if " ".join(fact.split()) not in text] == []


def test_what_will_be_downloaded(command: Command) -> None:
    _, lines, _ = command("yfcc")
    text = " ".join(" ".join(lines).split())
    assert (
        "download 1 file, 66 GB, from multimedia-commons.s3-us-west-2.amazonaws.com, mirrored into "
        "the corpus first by `evenmix mirror yfcc` Then each picture by itself, from "
        "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/"
        "{downloadurl:multimedia_commons_path}.jpg"
    ) in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recaps"], "the catalogue has no dataset recaps; did you mean 'redcaps'?"),
        (["xyz"], "the catalogue has no dataset xyz; `evenmix datasets` lists them"),
        (["--check"], "--check and --source want the NAME of a dataset"),
        (["yfcc", "--source", "x"], "--source is of use with --check only"),
    ],
)
def test_mistakes(command: Command, arguments: list[str], message: str) -> None:
    assert command(*arguments) == (1, [], f"error: {message}\n")


# The check


@pytest.fixture(scope="module")
def published() -> Iterator[Hub]:
    with serve_hub() as served:
        replicas.publish(served)
        yield served


@pytest.fixture
def hub(published: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with all miniatures, which a test may change."""
    monkeypatch.setattr(published, "repositories", dict(published.repositories))
    monkeypatch.setattr(published, "pages", dict(published.pages))
    point_at(published, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return published


def source_of(hub: Hub, name: str) -> Dataset:
    """Return a dataset at the test's server."""
    dataset = CATALOG[name].dataset
    if name in ELSEWHERE:
        return dataset.model_copy(update={"source": f"{hub.url}{ELSEWHERE[name]}"})
    return dataset


def of_miniature(hub: Hub, name: str) -> Entry:
    """Return the entry with the numbers of the miniature, and no more than that changed."""
    entry, dataset = CATALOG[name], source_of(hub, name)
    source, _ = resolve(dataset.source, dataset.revision)
    files = storage.glob_files(source)
    if name == "gptedit":
        # The miniature has what the catalogue says is unverified.
        entry = replace(entry, columns=(*entry.columns, "input", "instruction"))
    return replace(
        entry,
        num_files=len(files),
        num_bytes=sum(file.num_bytes for file in files),
        size_px=(None, None),
        gated=name == "pexels",
    )


def findings(hub: Hub, name: str, entry: Entry, dataset: Dataset | None = None) -> list[Finding]:
    return list(check(name, entry, dataset or source_of(hub, name), FETCH))


def differences(found: list[Finding]) -> list[str]:
    return [finding.text for finding in found if finding.differs]


@pytest.mark.parametrize("name", CATALOG)
def test_a_source_as_the_catalogue_says(hub: Hub, name: str) -> None:
    found = findings(hub, name, of_miniature(hub, name))
    assert differences(found) == []
    texts = "\n".join(finding.text for finding in found)
    assert "as the catalogue says" in texts
    assert ("give a local copy" in texts) == (name == "yfcc")
    assert ("picture: " in texts) == (name != "yfcc")


def test_the_first_picture_of_a_huge_archive_is_read_from_its_beginning(hub: Hub) -> None:
    path = ELSEWHERE[PLACES]
    whole = replicas.tar(
        [
            ("a.tar", replicas.tar([("a/abbey/7.jpg", replicas.photograph(7))])),
            ("b.tar", bytes(20 << 20)),
        ]
    )
    hub.pages[path] = Page(whole)
    entry = of_miniature(hub, PLACES)
    before = hub.num_bytes_sent
    assert [finding.text for finding in findings(hub, PLACES, entry)] == [
        "files: 1, as the catalogue says",
        f"bytes: {len(whole):,}, as the catalogue says",
        f'version: etag:"{hashlib.md5(whole).hexdigest()}"; `evenmix mirror` compares the checksum',
        "columns: none; the catalogue knows none",
        "records: 1 of the first 1 have a picture",
        "id: abbey/7, join: abbey_7",
        "picture: jpeg, 128 x 96 px",
    ]
    assert hub.num_bytes_sent - before == 4 << 20


def test_an_archive_that_begins_with_no_whole_picture(hub: Hub) -> None:
    path = ELSEWHERE["inaturalist"]
    huge = replicas.tar([("train/0_A/1.txt", b"about"), ("train/0_A/1.jpg", bytes(5 << 20))])
    hub.pages[path] = Page(gzip.compress(huge))
    found = differences(findings(hub, "inaturalist", of_miniature(hub, "inaturalist")))
    assert found == [
        f"{hub.url}{path} has no whole picture in its first 4,194,304 bytes: unexpected end of data"
    ]


def test_a_gzip_bomb_is_not_unpacked(hub: Hub) -> None:
    """Of a member that claims 1 GB, behind a header that wants it read whole."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as bomb:
        bomb.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(100):
            bomb.write(bytes(1 << 20))
    hub.pages[ELSEWHERE["inaturalist"]] = Page(packed.getvalue())
    tracemalloc.start()
    found = differences(findings(hub, "inaturalist", of_miniature(hub, "inaturalist")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "has no whole picture in its first 4,194,304 bytes" in found[0]
    assert peak < 40_000_000


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Its document claims 1,000 bytes and unpacks to 50 MB."""
    path = tmp_path / "redcaps.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/cats_2017.json", b" " * 50_000_000)
    content = bytearray(path.read_bytes())
    size = content.rindex(b"PK\x01\x02") + 24
    content[size : size + 4] = struct.pack("<L", 1000)
    path.write_bytes(content)
    dataset = CATALOG["redcaps"].dataset.model_copy(update={"source": str(path)})
    tracemalloc.start()
    *_, found = differences(list(check("redcaps", CATALOG["redcaps"], dataset, FETCH)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.startswith(f"{path} cannot be read as a zip archive (Bad CRC-32")
    assert peak < 10_000_000


def test_a_source_with_a_password_is_refused(command: Command) -> None:
    status, _, errors = command("yfcc", "--check", "--source", "https://me:pa55@x/a.sql")
    assert status == 1
    assert "source: has a user name or a password in it" in errors
    assert "pa55" not in errors


def test_a_source_that_is_gone(hub: Hub) -> None:
    entry = of_miniature(hub, PLACES)
    del hub.pages[ELSEWHERE[PLACES]]
    assert differences(findings(hub, PLACES, entry)) == [f"nothing at {hub.url}{ELSEWHERE[PLACES]}"]


def test_a_local_copy_of_the_database_is_read(hub: Hub, tmp_path: Path) -> None:
    copy = tmp_path / "yfcc100m_dataset.sql"
    copy.write_bytes(hub.pages[ELSEWHERE["yfcc"]].body)
    dataset = CATALOG["yfcc"].dataset.model_copy(
        update={
            "source": str(copy),
            "image_url": f"{hub.url}/data/images/{{downloadurl:multimedia_commons_path}}.jpg",
        }
    )
    found = findings(hub, "yfcc", of_miniature(hub, "yfcc"), dataset)
    assert differences(found) == []
    assert [finding.text for finding in found][-3:] == [
        "records: 7 of the first 10 have a picture, http_error 1, not_an_image 1, placeholder 1",
        "id: 6985418911, join: 6985418911",
        "picture: jpeg, 256 x 192 px",
    ]


def test_every_difference_is_reported(hub: Hub) -> None:
    repo, other_commit = hub.repositories["LucasFang/FLUX-Reason-6M"], "f" * 40
    commit = CATALOG["fluxreason"].dataset.revision
    assert commit is not None
    files = dict(repo.commits[commit])
    name = min(files)
    table = pq.read_table(io.BytesIO(files[name])).rename_columns(
        ["id", "image", "caption_original", "text", "caption_cn", "bool_caption_original", "score"]
    )
    files[name] = storage.parquet_bytes(table, {})
    hub.repositories["LucasFang/FLUX-Reason-6M"] = Repository({other_commit: files}, gated=True)
    entry = replace(CATALOG["fluxreason"], gated=False)
    found = differences(findings(hub, "fluxreason", entry))
    num_bytes = sum(map(len, files.values()))
    url = f"hf://datasets/LucasFang/FLUX-Reason-6M@{other_commit}/{name}"
    assert found[:-1] == [
        "gated: yes; the catalogue says no",
        "revision: hf://datasets/LucasFang/FLUX-Reason-6M has no such revision; correct it",
        "files: 4; the catalogue says 1,180",
        f"bytes: {num_bytes:,}; the catalogue says 823,000,000,000",
        "columns: score_* missing",
        "columns: text, score not in the catalogue",
    ]
    assert f"{url} has no column caption_detail" in found[-1]


def test_pictures_of_another_size_or_kind(hub: Hub) -> None:
    entry = of_miniature(hub, "pexels")
    assert differences(findings(hub, "pexels", replace(entry, size_px=(96, None)))) == []
    assert differences(findings(hub, "pexels", replace(entry, size_px=(640, None)))) == [
        "picture: webp, 96 x 96 px; the catalogue says 640 x any"
    ]


def test_a_rule_that_cannot_be_filled(hub: Hub) -> None:
    dataset = CATALOG["rendered_text"].dataset.model_copy(update={"id_rule": "{number}"})
    entry = of_miniature(hub, "rendered_text")
    assert differences(findings(hub, "rendered_text", entry, dataset)) == [
        *(
            f"record 000000.tar/{number:08}: it has no 'number'; it has folder, key, "
            "ocr_annotation, parent, path, stem"
            for number in range(4)
        ),
        "records: 0 of the first 4 have a picture, bad_record 4",
    ]


def test_dead_links_are_counted(hub: Hub) -> None:
    found = findings(hub, "megalith10m", of_miniature(hub, "megalith10m"))
    assert "records: 5 of the first 6 have a picture, http_error 1" in [
        finding.text for finding in found
    ]
    for path in list(hub.pages):
        if "flickr" in path:
            del hub.pages[path]
    assert differences(findings(hub, "megalith10m", of_miniature(hub, "megalith10m"))) == [
        "records: 0 of the first 6 have a picture, http_error 6"
    ]


def test_the_command_tells_findings_and_its_status_is_1_if_one_differs(
    hub: Hub, command: Command
) -> None:
    status, lines, _ = command("textatlas", "--check")
    assert status == 1
    num_bytes = sum(map(len, replicas.textatlas().values()))
    assert lines[1:] == [
        "  ok       gated: no; unverified in the catalogue",
        f"  ok       revision: {CATALOG['textatlas'].dataset.revision}, as the catalogue says",
        "  ok       files: 10; unverified in the catalogue",
        f"  DIFFERS  bytes: {num_bytes:,}; the catalogue says 1,200,000,000,000",
        "  ok       columns: image, image_path, annotation, as the catalogue says",
        "  ok       records: 3 of the first 3 have a picture",
        "  ok       id: CleanTextSynth:images/0.png, join: CleanTextSynth:images/0.png",
        "  ok       picture: png, 128 x 96 px",
        "1 difference from the catalogue",
    ]


def test_a_gate_without_a_token(
    hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    status, _, errors = command("pexels", "--check")
    assert status == 1
    assert errors.startswith(
        "error: hf://datasets/animetimm/pexels-tagger-v0-w640-ws-full is gated"
    )
    assert len(errors.splitlines()) == 1
