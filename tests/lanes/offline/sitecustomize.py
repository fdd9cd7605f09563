"""On PYTHONPATH: no network but this machine's own, and no vipr_utils but what a notebook finds by
itself.
"""

import os
import socket
import sys

LOCAL = ("127.", "localhost", "::1", "0.0.0.0")
connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo


def guarded_connect(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOCAL):
        raise OSError(f"the network is off, {address} was asked for")
    return connect(self, address)


def guarded_getaddrinfo(name, *args, **kwargs):
    if name and not str(name).startswith(LOCAL):
        raise socket.gaierror(f"the network is off, {name!r} was asked for")
    return getaddrinfo(name, *args, **kwargs)


socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_getaddrinfo
sys.path[:] = [p for p in sys.path if not p or not os.path.isdir(os.path.join(p, "vipr_utils"))]
sys.meta_path[:] = [
    f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
]
