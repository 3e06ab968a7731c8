"""A port for processes that are about to start."""

import socket


def reserved_port() -> tuple[socket.socket, str]:
    """A free port of this machine, and the socket that keeps it from everybody who asks for any.

    The port would be anybody's again from the socket's end on; until then it is given to none who
    lets the system choose. A server that sets ``SO_REUSEADDR``, as torch's store does, may listen
    on it all the same, because this socket does not.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    return keeper, str(keeper.getsockname()[1])
