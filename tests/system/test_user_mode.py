"""A service of a user without rights, and the TAP that root has given to this user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import eventually
from tests.system.bed import ROOT, Host, Service

pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.netns, pytest.mark.timeout(120)]

UID = 47110
MAC = "02:00:00:00:00:99"

# Answers whoever asks on the hub for the address 10.77.9.2.
_ANSWERS = f"""
import sys, time
from pkvpn.client.session import VpnClient
mac, address = bytes.fromhex("{MAC.replace(":", "")}"), bytes([10, 77, 9, 2])
client = VpnClient("127.0.0.1", int(sys.argv[1]), "T", "u1", "pw1")
client.connect()
print("connected", flush=True)
while True:
    for frame in client.handle():
        if frame[12:14] == b"\\x08\\x06" and frame[20:22] == b"\\0\\1" and frame[38:42] == address:
            asker = frame[22:32]
            answer = frame[14:20] + b"\\0\\2" + mac + address + asker
            client.send([frame[6:12] + mac + b"\\x08\\x06" + answer])
    time.sleep(0.01)
"""


def as_user(*command: str) -> list[str]:
    """Run a command as a user who owns nothing but what the test gives.

    In mounts of its own, where this user may do what it may on any machine: run the interpreter,
    also if that lives in root's home, and open /dev/net/tun.
    """
    lines = [
        "set -e",
        "mount -t tmpfs -o mode=755 none /dev/net",
        "mknod -m 666 /dev/net/tun c 10 200",
    ]
    for path in map(Path, dict.fromkeys((sys.base_prefix, sys.prefix, str(ROOT)))):
        closed = [one for one in path.parents if not one.stat().st_mode & 0o001]
        if closed:
            lines += [
                "spare=$(mktemp -d)",
                f"mount --bind {path} $spare",
                f"mount -t tmpfs -o mode=755 none {closed[-1]}",
                f"mkdir -p {path}",
                f"mount --move $spare {path}",
                "rmdir $spare",
            ]
    lines.append(
        f"exec setpriv --reuid {UID} --regid {UID} --clear-groups --pdeathsig TERM"
        ' --inh-caps=-all "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh", *command]


class ServiceOfAUser(Service):
    def _line(self, *words: str) -> list[str]:
        return as_user(*super()._line(*words))


@pytest.fixture
def service() -> Iterator[ServiceOfAUser]:
    directory = Path(tempfile.mkdtemp(prefix="pkvpn-user-"))
    os.chown(directory, UID, UID)
    host = Host()
    made = ServiceOfAUser(directory, 'listen = ["127.0.0.1:0"]\n', host)
    try:
        works = subprocess.run(
            [*host.beside(*as_user(sys.executable, "-c", "import pkvpn; open('/dev/net/tun')"))],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        if works.returncode:
            pytest.skip(f"another user cannot run this here: {works.stderr.strip()[-200:]}")
        made.start()
        made.add_hub("T", u1="pw1")
        yield made
    finally:
        made.stop()
        host.close()
        shutil.rmtree(directory)


def test_a_tap_that_belongs_to_the_user_is_bridged_and_another_one_is_refused(
    service: ServiceOfAUser,
) -> None:
    host = service.host
    assert host is not None
    status = service.json("status")
    assert status["mode"] == "user"
    assert os.stat(f"/proc/{status['watchdog']['pid']}").st_uid == UID
    for name, owner in (("mine", UID), ("others", UID + 1)):
        host.run("ip", "tuntap", "add", "dev", name, "mode", "tap", "user", str(owner))
        host.run("ip", "link", "set", name, "up")
    host.run("ip", "addr", "add", "10.77.9.1/24", "dev", "mine")
    before = host.device("mine")["ifindex"]

    with pytest.raises(AssertionError, match=r"others.*CAP_NET_ADMIN"):
        service.cli("bridge", "add", "T", "others")
    assert service.json("bridge", "add", "T", "mine")["state"] == "open"

    client = host.start(sys.executable, "-c", _ANSWERS, str(service.port()))
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "connected\n"

        def is_answered() -> bool:
            host.run("ip", "neigh", "flush", "dev", "mine")
            with pytest.raises(AssertionError):  # there is nobody to answer more than that
                host.run("ping", "-c", "1", "-W", "1", "10.77.9.2")
            return MAC in host.run("ip", "neigh", "show", "dev", "mine")

        eventually(is_answered, within=20.0)
        service.kill("core")
        eventually(is_answered, within=20.0)
    finally:
        client.kill()
        client.communicate()
    assert host.device("mine")["ifindex"] == before
    assert "bridge mine" in {entry["port"] for entry in service.json("mac", "list", "T")}
