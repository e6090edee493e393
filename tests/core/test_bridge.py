import os
import socket
import subprocess
import sys

import pytest

from pkvpn.channel import join_blocks, split_blocks
from pkvpn.core.bridge import BridgeError, Tap, open_tap


def test_frames_become_blocks_and_blocks_frames() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setblocking(False)
        tap = Tap("tap0", theirs.fileno())
        assert tap.read() == b""
        frames = [bytes([i]) * (60 + i) for i in range(100)]
        assert tap.write(join_blocks(frames[:3])) == 0
        assert [ours.recv(2000) for _ in range(3)] == frames[:3]
        sent = 0
        got: list[bytes] = []
        ours.setblocking(False)
        while len(got) < 100:
            while sent < 100:
                try:
                    ours.send(frames[sent])
                except BlockingIOError:
                    break
                sent += 1
            got += split_blocks(tap.read())
        assert got == frames


def test_a_device_that_takes_nothing_loses_frames_and_says_how_many() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.setblocking(False)
        assert Tap("tap0", theirs.fileno()).write(join_blocks([bytes(1000)] * 5000)) > 0


def test_a_device_that_is_gone_is_a_state_and_no_exception() -> None:
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    os.close(read_fd)
    tap = Tap("tap0", read_fd)
    assert tap.read() == b""
    assert tap.write(join_blocks([bytes(60)])) == 1
    assert tap.state == "failed: Bad file descriptor"


_SCRIPT = """
import os, subprocess
from pkvpn.channel import split_blocks
from pkvpn.core.bridge import BridgeError, Tap, open_tap

def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

fd = open_tap("tapx")
assert ",UP" in ip("link", "show", "tapx")
ip("addr", "add", "10.9.9.1/24", "dev", "tapx")
try:
    open_tap("tapx")
    raise SystemExit("a second one was let in")
except BridgeError as error:
    assert "bridge tapx: the TAP device tapx" in str(error), error
try:
    open_tap("tapy", "nobridge")
    raise SystemExit("no bridge, and no error")
except BridgeError as error:
    assert "master nobridge" in str(error), error
assert "tapy" not in ip("link", "show")
try:
    open_tap("lo")
    raise SystemExit("lo is no TAP")
except BridgeError as error:
    assert "bridge lo: the TAP device lo" in str(error), error
subprocess.run(["ping", "-c", "1", "-W", "1", "10.9.9.2"], capture_output=True)
frames = split_blocks(Tap("tapx", fd).read())
assert any(frame[12:14] == b"\\x08\\x06" for frame in frames), frames
os.close(fd)
assert "tapx" not in ip("link", "show")
os.setuid(65534)
try:
    open_tap("tapz")
    raise SystemExit("nobody may open a device")
except BridgeError as error:
    assert "CAP_NET_ADMIN" in str(error), error
"""


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.netns
def test_a_real_device_is_opened_set_up_and_refused_by_name() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _SCRIPT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


_DELETED = """
import os, subprocess
from pkvpn.core.accounts import BridgeRecord
from pkvpn.core.bridge import is_deleted
from pkvpn.taps import Taps

taps, bridges = Taps(), [BridgeRecord("tapx", 1, "")]
(held,) = taps.held(bridges)
(fd,) = held.open()
assert not is_deleted(fd)
assert taps.held(bridges) == [held], "a reload opened anew what is well"
subprocess.run(["ip", "link", "del", "tapx"], check=True)
assert is_deleted(fd)
(again,) = taps.held(bridges)
assert again != held, "it is not opened anew"
(new,) = again.open()
os.close(fd)
assert not is_deleted(new)
assert not taps.refused()
subprocess.run(["ip", "link", "show", "tapx"], check=True)
assert taps.held(bridges) == [again]
"""


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.netns
def test_a_device_that_was_deleted_is_made_again_by_a_reload() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", _DELETED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_system_without_taps_is_an_error_that_names_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BridgeError, match="bridge tap0: there is no local bridge on darwin"):
        open_tap("tap0")
