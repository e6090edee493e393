"""Two clients of ours that exchange numbered frames until they are told to end.

    python -m tests.boot.visitor PORT

Prints {"ready": true} when frames go both ways, and after an end of file on its standard input one
line with what became of them.
"""

from __future__ import annotations

import json
import select
import sys
import time

from pkvpn.client.session import VpnClient
from tests.system.test_own_clients import MAC1, MAC2, exchange, frame

EVERY = 0.002


def main(port: int) -> None:
    clients = [VpnClient("127.0.0.1", port, "T", f"u{n}", f"pw{n}") for n in (1, 2)]
    for client in clients:
        client.connect()
    one, two = clients
    exchange(one, two, b"hello")
    print(json.dumps({"ready": True}), flush=True)
    sent, got, silence, last = 0, set[int](), 0.0, time.monotonic()
    ending = 0.0
    while not ending or time.monotonic() < ending:
        if not ending and select.select([sys.stdin], [], [], 0)[0]:
            ending = time.monotonic() + 1.0  # for those on their way
        if not ending:
            one.send([frame(MAC2, MAC1, b"number" + sent.to_bytes(8, "big"))])
            sent += 1
        one.handle()
        now = time.monotonic()
        for data in two.handle():
            if data[14:20] == b"number":
                got.add(int.from_bytes(data[20:28], "big"))
                silence, last = max(silence, now - last), now
        select.select([], [], [], EVERY)
    told = [{"logins": client.logins, "resumptions": client.resumptions} for client in clients]
    print(json.dumps({"sent": sent, "got": len(got), "silence": silence, "clients": told}))
    for client in clients:
        client.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
