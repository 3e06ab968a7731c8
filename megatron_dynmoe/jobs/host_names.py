"""Host names that lead nowhere: those of containers, and of nodes that no name server knows.

PyTorch's processes find one another by the name of rank 0's machine. If the name cannot be
resolved, they wait for minutes, and each at another point: torchrun before it starts any rank, a
rank in its first connection. On a single machine nobody has to look for it. For several machines,
this module never guesses an address. It does not import torch.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

# When the other machines start, a name server may not know the first one yet. Seconds.
PATIENCE = 60.0


def addresses(name: str) -> list[str]:
    """The addresses that a name leads to, as text; empty if it leads nowhere."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError means that the text cannot be a name
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_of_this_machine(address: str) -> bool:
    """Whether a socket of this machine can have the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def resolves_to_this_machine(name: str) -> bool:
    """Whether a name can be resolved, and to this machine."""
    return any(map(is_of_this_machine, addresses(name)))


def own_name() -> str:
    """The name by which torchrun would tell its ranks to look for this machine."""
    return socket.getfqdn()


def loopback() -> str:
    """A name or address that leads from this machine to itself, whatever its own name is."""
    return "localhost" if resolves_to_this_machine("localhost") else "127.0.0.1"


def fix_master_address(patience: float = PATIENCE) -> None:
    """Replace a ``MASTER_ADDR`` that cannot be resolved, if all ranks are on this machine.

    Args:
        patience: how many seconds ranks on several machines wait for the name.

    Raises:
        ValueError: there are several machines, and their ranks could not find each other.
    """
    name = os.environ.get("MASTER_ADDR", "")
    if not name or addresses(name):
        return
    is_first = os.environ.get("RANK", "0") == "0"
    if is_one_machine():
        os.environ["MASTER_ADDR"] = loopback()
        interface = _loopback_interface()
        if interface and not addresses(socket.gethostname()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # Gloo resolves its name, too
        if is_first:
            print(
                f"> MASTER_ADDR is {name}, which cannot be resolved: the ranks of this one machine "
                f"meet at {os.environ['MASTER_ADDR']}",
                flush=True,
            )
        return
    if is_first:
        print(f"> MASTER_ADDR is {name}, which cannot be resolved yet: waiting", flush=True)
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(min(1.0, patience))
        if addresses(name):
            return
    raise ValueError(
        f"MASTER_ADDR is {name}, which {socket.gethostname()} cannot resolve: give the address of "
        "the first machine (torchrun: --master-addr, with a c10d rendezvous --local-addr there; "
        "launch/: NETWORK_INTERFACE), or enter the name in /etc/hosts or the name server."
    )


def is_one_machine() -> bool:
    """Whether the variables of the launcher say that all ranks are on this machine."""
    world = os.environ.get("WORLD_SIZE", "1")
    machines = os.environ.get("GROUP_WORLD_SIZE")  # torchrun sets it
    return world in ("1", os.environ.get("LOCAL_WORLD_SIZE")) and machines in (None, "1")


def _loopback_interface() -> str | None:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)
