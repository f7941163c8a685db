"""Which addresses are public, in every spelling; one look-up a name."""

import asyncio
import socket
from ipaddress import ip_address

import pytest

from pipeline import addresses
from pipeline.addresses import PrivateAddressError, Resolver, is_public


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "151.101.1.140", "2606:4700::6810:84e5", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("192.0.2.1", "198.18.0.1", "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff0e::1"),
        *("2001:db8::1", "3fff::1", "5f00::1", "2606:4700::1%eth0"),
        # IPv4 addresses inside: mapped, compatible, NAT64, NAT64 of a local prefix, 6to4, Teredo.
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::7f00:1", "64:ff9b::7f00:1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::"),
        "2001:0:4136:e378:8000:63bf:807f:fffe",
    ],
)
def test_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


def _addresses_of(host: str, allow_private: bool = False) -> list[str]:
    async def resolve() -> list[str]:
        resolver = Resolver(allow_private)
        try:
            return await resolver.addresses(host)
        finally:
            await resolver.close()

    return asyncio.run(resolve())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "::1", "localhost", "LOCALHOST"],
)
def test_every_spelling_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(PrivateAddressError, match="not a public address"):
        _addresses_of(host)
    assert set(_addresses_of(host, allow_private=True)) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 70}.example", "no-such-name.invalid", "h%00"])
def test_names_that_are_none(host: str) -> None:
    with pytest.raises(socket.gaierror):
        _addresses_of(host)


def test_only_the_public_ones_of_several_addresses_are_given_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1"]
    monkeypatch.setattr(addresses, "look_up", lambda host: found)
    assert _addresses_of("both.example") == ["8.8.8.8", "2606:4700::1"]


def test_a_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    monkeypatch.setattr(addresses, "look_up", lambda host: next(answers))

    async def resolve() -> list[str]:
        resolver = Resolver(allow_private=False)
        at_once = await asyncio.gather(*(resolver.resolve("r.example", 80) for _ in range(3)))
        later = await resolver.resolve("r.example", 443)
        await resolver.close()
        return [answer["host"] for each in (*at_once, later) for answer in each]

    assert asyncio.run(resolve()) == ["8.8.8.8"] * 4


def test_an_answer_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["8.8.8.8"], ["127.0.0.1"]])
    monkeypatch.setattr(addresses, "look_up", lambda host: next(answers))
    monkeypatch.setattr(addresses, "_KEEP_ANSWERS_S", 0.05)

    async def main() -> None:
        resolver = Resolver(allow_private=False)
        assert await resolver.addresses("example.com") == ["8.8.8.8"]
        await asyncio.sleep(0.2)
        with pytest.raises(PrivateAddressError):
            await resolver.addresses("example.com")
        await resolver.close()

    asyncio.run(main())


@pytest.mark.parametrize(("error", "lookups"), [(socket.EAI_AGAIN, 2), (socket.EAI_NONAME, 1)])
def test_only_a_temporary_failure_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch, error: int, lookups: int
) -> None:
    asked = []

    def fail(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(error, "no answer")

    monkeypatch.setattr(addresses, "look_up", fail)

    async def resolve() -> None:
        resolver = Resolver(allow_private=False)
        for _ in range(2):
            with pytest.raises(socket.gaierror):
                await resolver.addresses("r.example")
        await resolver.close()

    asyncio.run(resolve())
    assert len(asked) == lookups
