"""Two clients of ours, of which one sends back each numbered frame of the other.

    python -m tests.boot.visitor PORT

Prints {"ready": true} when frames go both ways; for each line on its standard input the longest
silence since the last one; and after the end of it, one line with what became of all frames.

Both speak: where only one does, the core that comes after another does not know where the other is,
so all frames go through it, and what is in its hands when it is killed is lost.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from pkvpn.client.session import VpnClient
from tests.system.test_own_clients import MAC1, MAC2, exchange, frame

EVERY = 0.002
PATIENCE = 2.0  # for those on their way at the end
THERE, BACK = b"number", b"echoed"


def main(port: int) -> None:
    clients = [VpnClient("127.0.0.1", port, "T", f"u{n}", f"pw{n}") for n in (1, 2)]
    for client in clients:
        client.connect()
    one, two = clients
    exchange(one, two, b"hello")
    say(ready=True)
    sent, back, silence, last = 0, set[bytes](), 0.0, time.monotonic()
    ending = 0.0
    while not ending or (len(back) < sent and time.monotonic() < ending):
        if not ending and select.select([sys.stdin], [], [], 0)[0]:
            asked = os.read(sys.stdin.fileno(), 1 << 16)
            for _ in asked.splitlines():
                say(silence=round(silence, 3))
                silence = 0.0
            ending = 0.0 if asked else time.monotonic() + PATIENCE
        if not ending:
            one.send([frame(MAC2, MAC1, THERE + sent.to_bytes(8, "big"))])
            sent += 1
        for data in two.handle():
            if data[14:20] == THERE:
                two.send([frame(MAC1, MAC2, BACK + data[20:28])])
        now = time.monotonic()
        silence = max(silence, now - last)
        for data in one.handle():
            if data[14:20] == BACK:
                back.add(data[20:28])
                last = now
        select.select([], [], [], EVERY)
    told = [{"logins": client.logins, "resumptions": client.resumptions} for client in clients]
    say(sent=sent, lost=sent - len(back), clients=told)
    for client in clients:
        client.close()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
