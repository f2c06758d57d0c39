"""What counts as one peer, where a bound is per peer."""

from __future__ import annotations

import ipaddress

IPV6_SITE_BITS = 64
"""One subscriber has at least so large a network, and every address in it (RFC 6177)."""


def site_of(host: str) -> str:
    """The peer behind an address: an IPv4 address, or a subscriber's IPv6 network."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), IPV6_SITE_BITS), strict=False))
