"""What our client must manage with SoftEther's own server; run by `test_real_server`.

It stands alone because it runs in a network namespace, where the server is.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing

import pytest

from pkvpn.client.machine import Credentials
from pkvpn.client.session import LoginRefused, VpnClient
from tests.support import eventually

HOST, PORT = "127.0.0.1", 443
TAP = "pktest0"
A, B = b"\x02aaaaa", b"\x02bbbbb"


def main() -> None:
    with ExitStack() as stack:
        a = stack.enter_context(closing(VpnClient(HOST, PORT, "T", "u1", "pw1")))
        plain = Credentials.with_plain_password("t", "U2", "pw2")
        b = stack.enter_context(closing(VpnClient(HOST, PORT, "", "", credentials=plain)))
        a.connect(10)
        b.connect(10)
        to_all = b"\xff" * 6 + A + b"\x88\xb5" + bytes(46)
        to_a = A + B + b"\x88\xb5" + bytes(46)

        def reaches() -> bool:
            a.send([to_all])
            return to_all in b.receive(0.2)

        eventually(reaches)  # a session of this server gets frames only a while after its welcome
        b.send([to_a])
        assert a.receive(5) == [to_a]

        # Not a cut: the server itself is poisoned by an end without close_notify.
        assert a._tls is not None
        try:
            a._tls.unwrap()
        except OSError:
            pass
        until = time.monotonic() + 5
        while not a.resumptions:
            assert time.monotonic() < until, (a.stage, a.error)
            a.receive(0.1)
        assert a.logins == 1
        b.send([to_a])
        assert a.receive(5) == [to_a]

    for hub, user, code in (("T", "u1", 9), ("T", "nobody", 9), ("none", "u1", 8)):
        with closing(VpnClient(HOST, PORT, hub, user, "wrong")) as client:
            with pytest.raises(LoginRefused) as caught:
                client.connect(10)
            assert (caught.value.code, client.stage) == (code, "login")

    connect_verb()


def has_tap() -> bool:
    # Not /sys: that one shows the interfaces of the namespace where it was mounted.
    return TAP in (name for _, name in socket.if_nameindex())


def connect_verb() -> None:
    """A TAP of the verb `connect` answers the ARP of another client, both ways a frame."""
    words = ["--server", HOST, "--hub", "T", "--user", "u2", "--tap", TAP, "--password-stdin"]
    verb = subprocess.Popen(
        [sys.executable, "-m", "pkvpn", "connect", *words], stdin=subprocess.PIPE, text=True
    )
    try:
        assert verb.stdin is not None
        verb.stdin.write("pw2\n")
        verb.stdin.close()
        eventually(has_tap)
        subprocess.run(["ip", "addr", "add", "10.5.0.1/24", "dev", TAP], check=True)
        with closing(VpnClient(HOST, PORT, "T", "u1", "pw1")) as client:
            client.connect(10)
            question = bytes.fromhex("0001080006040001") + A + bytes([10, 5, 0, 2])
            question += bytes(6) + bytes([10, 5, 0, 1])
            asked = b"\xff" * 6 + A + b"\x08\x06" + question

            def answered() -> bool:
                client.send([asked])
                return any(f[:6] == A and f[12:14] == b"\x08\x06" for f in client.receive(0.2))

            eventually(answered)
        verb.terminate()
        assert verb.wait(5) == 0
        assert not has_tap()
    finally:
        verb.kill()
        verb.wait()


if __name__ == "__main__":
    main()
