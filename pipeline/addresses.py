"""Which network addresses are public, and the addresses behind a host name.

A URL from a stranger may name the machine itself, its network, or the metadata server of a cloud.
So a name is looked up once, what it leads to is checked, and the connection goes to an address
that was checked: an answer that changes later (DNS rebinding) changes nothing.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult

_CONCURRENT_LOOKUPS = 16
_KEEP_ANSWERS_S = 300.0

# What Python 3.11 takes for global, beside multicast.
_NOT_PUBLIC_V4 = (
    ip_network("168.63.129.16/32"),  # the host of an Azure machine
    ip_network("192.0.0.0/24"),  # RFC 6890, protocol assignments; Oracle's metadata server
    ip_network("192.88.99.0/24"),  # RFC 7526, relays of 6to4
)
_GLOBAL_UNICAST = ip_network("2000::/3")  # RFC 4291, section 2.4; all that IANA gives out
_NOT_PUBLIC_V6 = (
    ip_network("2002::/16"),  # RFC 7526, 6to4: an IPv4 address in a form without further use
    ip_network("3fff::/20"),  # RFC 9637, documentation
)
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


class PrivateAddressError(Exception):
    """A host is, or has only, addresses that are not public."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether an address belongs to a host of the public internet.

    Not public are private, loopback, link-local, shared, multicast, reserved and documentation
    addresses. IPv6 forms of IPv4 addresses are judged by those (mapped, NAT64) or refused (6to4,
    Teredo, IPv4-compatible).
    """
    if isinstance(address, IPv4Address):
        return (
            address.is_global
            and not address.is_multicast
            and not any(address in network for network in _NOT_PUBLIC_V4)
        )
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    return (
        address in _GLOBAL_UNICAST
        and address.is_global
        and not any(address in network for network in _NOT_PUBLIC_V6)
    )


def look_up(host: str) -> list[str]:
    """Ask the system for the addresses of a host name, in its order of preference.

    Numbers that C libraries take for addresses (``2130706433``, ``0x7f.1``) are looked up too.

    Raises:
        socket.gaierror: there are none; :func:`is_temporary` tells whether that may change.
    """
    try:
        answers = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    except UnicodeError as error:  # empty and overlong labels
        raise socket.gaierror(socket.EAI_NONAME, f"not a host name: {error}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


def is_temporary(error: socket.gaierror) -> bool:
    """Tell whether a failed look-up may succeed later: all but "there is no such name"."""
    return error.errno not in (socket.EAI_NONAME, socket.EAI_NODATA)


class Resolver(AbstractResolver):
    """Looks up each host once in five minutes; gives out only what may be connected to.

    It is made, used and closed in one event loop.
    """

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._lookups: dict[str, asyncio.Future[list[str]]] = {}
        # Threads of their own: a look-up can block for a minute and cannot be ended.
        self._threads = ThreadPoolExecutor(_CONCURRENT_LOOKUPS, "look-up")

    async def addresses(self, host: str) -> list[str]:
        """Return the addresses behind a name, or the one that the host is itself.

        Raises:
            PrivateAddressError: none of them may be connected to.
            socket.gaierror: there are none.
        """
        try:
            found = [str(ip_address(host))]
        except ValueError:
            found = await self._look_up_once(host)
        allowed = [a for a in found if self._allow_private or is_public(ip_address(a))]
        if not allowed:
            raise PrivateAddressError(f"{host} is at {found[0]}, which is not a public address")
        return allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Tell aiohttp where to connect."""
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self.addresses(host)
        ]

    async def close(self) -> None:
        """Forget the answers; look-ups that still block are left to end by themselves."""
        for lookup in self._lookups.values():
            lookup.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up_once(self, host: str) -> list[str]:
        lookup = self._lookups.get(host)
        if lookup is None:
            lookup = asyncio.get_running_loop().run_in_executor(self._threads, look_up, host)
            self._lookups[host] = lookup
            lookup.add_done_callback(lambda done: self._forget_in_time(host, done))
        # Whoever stops waiting, at a deadline, leaves the look-up to the others.
        return await asyncio.shield(lookup)

    def _forget_in_time(self, host: str, lookup: asyncio.Future[list[str]]) -> None:
        if lookup.cancelled():
            return
        error = lookup.exception()
        if isinstance(error, socket.gaierror) and is_temporary(error):
            del self._lookups[host]
        else:
            lookup.get_loop().call_later(_KEEP_ANSWERS_S, self._lookups.pop, host)
