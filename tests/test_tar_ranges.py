"""The parts of a tar, each found by itself, hold every member once and no sample twice."""

import io
import random
import tarfile
from contextlib import suppress
from itertools import groupby

import pytest

from pipeline.errors import EvenmixError
from pipeline.readers.tar_ranges import DamagedTar, Member, Part, read_part, split, walk
from pipeline.readers.webdataset import sample_key
from tests.sources import Members, tar_bytes

BLOCK = tarfile.BLOCKSIZE
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def parts_of(data: bytes, bytes_per_part: int) -> list[list[Member]]:
    return [list(read(data, part)) for part in split(0, len(data), bytes_per_part)]


def read(data: bytes, part: Part) -> list[Member]:
    return list(read_part(io.BytesIO(data), part, sample_key, "a.tar"))


def contents(data: bytes, members: list[Member]) -> Members:
    return [(member.name, data[member.data : member.data + member.num_bytes]) for member in members]


def random_samples(source: random.Random, long_names: bool) -> Members:
    """Return samples of one to four members: empty ones, large ones, folders, long names."""
    members: Members = []
    for number in range(source.randrange(1, 40)):
        folder = "folder/" * source.choice([0, 0, 1, 30 if long_names else 1])
        if source.random() < 0.1:
            members.append((f"{folder}{number}/", b""))
        for suffix in source.sample(["jpg", "json", "txt", "seg.png"], source.randrange(1, 5)):
            size = source.choice([0, 1, 100, BLOCK, BLOCK + 1, source.randrange(9000)])
            members.append((f"{folder}{number:03d}.{suffix}", source.randbytes(size)))
    return members


@pytest.mark.parametrize("tar_format", FORMATS)
@pytest.mark.parametrize("seed", range(20))
def test_parts_together_are_the_whole(seed: int, tar_format: str) -> None:
    source = random.Random(seed)
    members = random_samples(source, long_names=tar_format != "ustar")
    data = tar_bytes(members, FORMATS[tar_format])
    expected = [(name.rstrip("/"), content) for name, content in members]
    for bytes_per_part in [1, BLOCK, 1000, 5000, source.randrange(1, len(data)), len(data)]:
        if len(data) // bytes_per_part > 2000:
            continue
        parts = parts_of(data, bytes_per_part)
        found = [member for part in parts for member in part]
        assert [(n.rstrip("/"), c) for n, c in contents(data, found)] == expected
        samples = [[sample_key(m.name) for m in part if m.is_file] for part in parts]
        in_parts = [key for part in samples for key, _ in groupby(part)]
        assert in_parts == [key for key, _ in groupby(key for part in samples for key in part)]


def test_the_members_are_those_of_tarfile() -> None:
    """Long names of both kinds, a link, a folder, pax sizes, names of any bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, pax in [
            ("é" * 200, tarfile.REGTYPE, {}),
            ("caf\udce9.jpg", tarfile.REGTYPE, {}),
            ("folder", tarfile.DIRTYPE, {"comment": "a b=c\nd"}),
            ("link", tarfile.SYMTYPE, {}),
            ("sized", tarfile.REGTYPE, {"size": "700"}),
            ("last", tarfile.CONTTYPE, {}),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.pax_headers, info.linkname = kind, pax, "x" * 150
            info.size = 700 if kind in tarfile.REGULAR_TYPES else 0
            tar.addfile(info, io.BytesIO(bytes(700)))
    data = buffer.getvalue()
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, encoding="utf-8", errors="backslashreplace") as tar:
        expected = [(i.name, i.isreg(), i.offset, i.offset_data, i.size) for i in tar]
    found = walk(io.BytesIO(data), 0, len(data))
    assert [(m.name, m.is_file, m.begin, m.data, m.num_bytes) for m in found] == expected


def test_a_part_within_one_member_is_empty() -> None:
    data = tar_bytes([("a.jpg", b"x"), ("b.jpg", bytes(50_000)), ("c.jpg", b"x"), ("d.jpg", b"x")])
    names = [[member.name for member in part] for part in parts_of(data, 8_000)]
    assert [name for part in names for name in part] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert names.count([]) >= 5


def test_parts_of_a_tar_inside_a_file_find_their_members() -> None:
    """The tar begins in the midst of a file and of a block, as one inside a tar may not."""
    members: Members = [(f"{number:02d}.jpg", bytes([number]) * 700) for number in range(40)]
    inner = tar_bytes(members)
    data = bytes(777) + inner + b"behind"
    parts = [contents(data, read(data, part)) for part in split(777, 777 + len(inner), 4000)]
    assert [member for part in parts for member in part] == members
    assert max(map(len, parts)) < 10


def test_a_tar_in_a_member_is_noticed_where_a_cut_falls_into_it() -> None:
    inner = tar_bytes([(f"inner{number}.jpg", bytes(600)) for number in range(20)])
    data = tar_bytes(
        [("a.jpg", b"x"), ("b.dat", inner), *((f"{n}.jpg", bytes(600)) for n in range(9))]
    )
    first, second, *_ = split(0, len(data), 6000)
    with pytest.raises(
        EvenmixError, match=r"^a.tar: the member before byte .* raise images.bytes_per_shard"
    ):
        read(data, first)
    assert [m.name for m in read(data, second)]  # deceived, but never published with the first
    assert len(read(data, Part(0, len(data), 0, len(data)))) == 11


def test_a_tar_between_blocks_deceives_nobody() -> None:
    inner = tar_bytes([(f"inner{number}.jpg", bytes(600)) for number in range(20)])
    members: Members = [("a.dat", b"odd" + inner), *((f"{n}.jpg", bytes(600)) for n in range(9))]
    data = tar_bytes(members)
    assert [m for part in parts_of(data, 4000) for m in contents(data, part)] == members


def test_damage_costs_the_rest_of_its_part_only() -> None:
    members: Members = [(f"{number:02d}.jpg", bytes([number]) * 600) for number in range(60)]
    whole = tar_bytes(members)
    parts = split(0, len(whole), 20_000)
    expected = [contents(whole, read(whole, part)) for part in parts]
    data = bytearray(whole)
    damaged = 20 * 3 * BLOCK  # the header of 20.jpg, in the midst of the second part
    data[damaged + 150] ^= 1  # a digit of its checksum
    for number, part in enumerate(parts):
        found = list[Member]()
        try:
            for member in read_part(io.BytesIO(data), part, sample_key, "a.tar"):
                found.append(member)
        except DamagedTar as error:
            assert number == 1
            assert str(error).startswith(f"no header at byte {damaged}")
            assert contents(whole, found) == expected[1][: len(found)]
            assert found[-1].name == "19.jpg"
        else:
            assert number != 1
            assert contents(whole, found) == expected[number]


def test_what_stands_behind_the_end_is_noticed() -> None:
    """As when tars are put together with cat, or a copy left a hole of zeros."""
    data = tar_bytes([("a.jpg", b"x")]) + tar_bytes([("b.jpg", b"x")])
    with pytest.raises(DamagedTar, match="it goes on behind its end"):
        read(data, Part(0, len(data), 0, len(data)))
    padded = tar_bytes([("a.jpg", b"x")]) + bytes(3 << 20)
    assert len(read(padded, Part(0, len(padded), 0, len(padded)))) == 1


def test_a_sample_of_very_many_members_is_cut() -> None:
    members: Members = [(f"a.{number}", b"") for number in range(600)]
    data = tar_bytes(members)
    parts = parts_of(data, 100 * BLOCK)
    assert [m for part in parts for m in contents(data, part)] == members
    assert max(map(len, parts)) < 500


def forged(data: bytes, offset: int, content: bytes) -> bytes:
    """Return a tar whose first header has ``content`` at ``offset``, and a good checksum."""
    header = bytearray(data[:BLOCK])
    header[offset : offset + len(content)] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[BLOCK:]


def test_a_pax_size_goes_before_the_header_s() -> None:
    """As in members above 8 GiB, whose size the header cannot hold."""
    extended = forged(tar_bytes([("a", b"12 size=700\n")]), 156, b"x")[: 2 * BLOCK]
    member = forged(tar_bytes([("a.jpg", b"x" * 700)]), 124, b"00000000000\0")
    data = extended + member
    (found,) = walk(io.BytesIO(data), 0, len(data))
    assert (found.begin, found.data, found.num_bytes) == (0, 3 * BLOCK, 700)


def test_the_size_of_a_link_is_no_size_of_data() -> None:
    link = forged(forged(tar_bytes([("link", b"")]), 156, tarfile.LNKTYPE), 124, b"00000001274\0")
    data = link[:BLOCK] + tar_bytes([("a.jpg", b"x")])
    assert [m.name for m in walk(io.BytesIO(data), 0, len(data))] == ["link", "a.jpg"]


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
@pytest.mark.parametrize(
    "size", [b"\x80" + (1 << 60).to_bytes(11, "big"), b"77777777777\0", b"\xff" * 12]
)
def test_an_extended_header_of_absurd_size_is_damage(kind: bytes, size: bytes) -> None:
    data = forged(forged(tar_bytes([("a.jpg", b"x")]), 156, kind), 124, size)
    with pytest.raises(DamagedTar, match="an extended header of"):
        next(walk(io.BytesIO(data), 0, len(data)))


def test_endless_extended_headers_are_damage() -> None:
    extended = forged(tar_bytes([("a.jpg", b"")]), 156, b"L")[:BLOCK]
    data = extended * 5000
    with pytest.raises(DamagedTar, match="more than 16 extended headers"):
        next(walk(io.BytesIO(data), 0, len(data)))


@pytest.mark.parametrize(
    "records",
    [b"9999 path=x\n", b"0 path=x\n", b"5 path=x\n", b"junk", b"-9 path=x\n", b"11 size=-1\n"],
)
def test_a_broken_pax_header_is_damage(records: bytes) -> None:
    extended = forged(tar_bytes([("a", records)]), 156, b"x")[: 2 * BLOCK]
    data = extended + tar_bytes([("a.jpg", b"x")])
    with pytest.raises(DamagedTar, match="a broken"):
        next(walk(io.BytesIO(data), 0, len(data)))


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_never_does_worse_than_damage(seed: int) -> None:
    source = random.Random(seed)
    data = bytearray(tar_bytes(random_samples(source, long_names=True), tarfile.PAX_FORMAT))
    for _ in range(source.randrange(1, 4)):
        place = source.randrange(len(data))
        data[place] = source.randrange(256)
    for part in split(0, len(data), 10_000):
        position = part.begin
        with suppress(DamagedTar, EvenmixError):
            for member in read_part(io.BytesIO(data), part, sample_key, "a.tar"):
                assert position <= member.begin < member.data <= member.next < len(data) + BLOCK
                position = member.next
