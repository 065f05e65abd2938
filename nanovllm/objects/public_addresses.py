"""Which addresses a host that a job names may have: public ones, and those of networks that the settings allow.

`ipaddress.is_global` differs between releases of Python (CVE-2024-4032), and calls multicast and NAT64 global.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

# IANA's registries of special-purpose addresses, and what carries addresses of IPv4 inside (6to4, Teredo).
_SPECIAL = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        ),
    )
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")


def is_allowed(address: str, networks: Sequence[Network]) -> bool:
    """Whether ``address`` is public, or lies in one of ``networks`` and is neither link-local nor multicast."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped  # the system connects to the IPv4 address
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return False
    if any(ip in network for network in networks):
        return True
    is_unicast = ip.version == 4 or ip in _GLOBAL_UNICAST
    return is_unicast and not any(ip in network for network in _SPECIAL)
