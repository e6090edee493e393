"""Coverage-guided fuzzing of the codecs with atheris; see README.md beside this file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # type: ignore[import-untyped,unused-ignore]  # only here, not a dependency

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["pkvpn"]):
    from pkvpn import channel
    from pkvpn.channel import ChannelError, Mode
    from pkvpn.client.machine import Credentials, Stream
    from pkvpn.core import blob as blobs
    from pkvpn.edge.checkpoint import Checkpoint, CheckpointError, checkpoint_size
    from pkvpn.edge.tls_records import SUITES, Opener, Sealer, TLSError, record_size
    from pkvpn.protocol import blocks, http, messages
    from pkvpn.protocol.errors import ProtocolError
    from pkvpn.protocol.pack import Pack
    from pkvpn.watchdog.lifeline import CorruptLifeline, LifelineDecoder, OrderDecoder

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "protocol"


def _cuts(data: bytes) -> tuple[bytes, list[bytes]]:
    """The first byte says into pieces of which size the rest is cut."""
    size = data[0] + 1 if data else 1
    rest = data[1:]
    return rest, [rest[at : at + size] for at in range(0, len(rest), size)]


def fuzz_pack(data: bytes) -> None:
    pack = Pack.decode(data)
    assert Pack.decode(pack.encode()) == pack


def fuzz_messages(data: bytes) -> None:
    pack = Pack.decode(data)
    for read in (
        messages.read_client_message,
        messages.Hello.from_pack,
        messages.Welcome.from_pack,
        messages.AdditionalReply.from_pack,
        messages.ErrorReply.find,
    ):
        try:
            message = read(pack)
        except ProtocolError:
            continue
        if isinstance(message, messages.Welcome):
            Pack.decode(message.encode())
        elif message is not None and not isinstance(message, messages.Admin):
            Pack.decode(message.to_pack().encode())


def fuzz_request(data: bytes) -> None:
    whole, pieces = _cuts(data)
    requests: list[bytes] | None
    try:
        requests = http.RequestCutter().feed(whole)
    except ProtocolError:
        requests = None
    cutter, got = http.RequestCutter(), []
    try:
        for piece in pieces:
            got += cutter.feed(piece)
    except ProtocolError:
        assert requests is None
    else:
        assert got == requests
    for raw in got:
        http.parse_request(raw)


def fuzz_response(data: bytes) -> None:
    _, pieces = _cuts(data)
    cutter = http.ResponseCutter()
    for piece in pieces:
        cutter.feed(piece)
        while cutter.cut() is not None:
            pass


def fuzz_blocks(data: bytes) -> None:
    whole, pieces = _cuts(data)
    frames = blocks.BlockDecoder().feed(whole)
    decoder = blocks.BlockDecoder()
    assert [frame for piece in pieces for frame in decoder.feed(piece)] == frames


def fuzz_stream(data: bytes) -> None:
    _, pieces = _cuts(data)
    stream = Stream(Credentials.anonymous("T", "u"), host="h", now=0.0, random=bytes)
    for piece in pieces:
        stream.receive(piece, 0.0)
        stream.expire(0.0)


def fuzz_channel(data: bytes) -> None:
    for decode in (channel.decode_from_edge, channel.decode_from_core):
        try:
            message = decode(data)
        except ChannelError:
            continue
        assert decode(channel.encode(message)) == message
    for walk in (channel.split_blocks, channel.count_blocks):
        try:
            walk(data)
        except ChannelError:
            pass


def fuzz_blob(data: bytes) -> None:
    try:
        blob = blobs.decode(data)
    except blobs.BlobError:
        return
    assert blobs.decode(blob.encode()) == blob


def fuzz_tls_records(data: bytes) -> None:
    """What a client sends that has the key, so that its records open."""
    _, pieces = _cuts(data)
    suite = SUITES["TLS_AES_128_GCM_SHA256"]
    sealer, opener = Sealer(suite, bytes(32)), Opener(suite, bytes(32))
    out = memoryview(bytearray(1 << 15))
    for piece in pieces:
        record = memoryview(bytearray(len(piece) + 64))
        size = sealer.seal(memoryview(bytearray(piece)), record)
        try:
            opener.open(record[:size], out)
        except TLSError:
            break
    try:
        size = record_size(memoryview(bytearray(data + bytes(5))))
        Opener(suite, bytes(32)).open(memoryview(bytearray(data.ljust(size, b"x")[:size])), out)
    except TLSError:
        pass


def fuzz_checkpoint(data: bytes) -> None:
    """A header of ours, then anything where the slots are."""
    size = checkpoint_size(2, 4096, 4096)
    memory = bytearray(size)
    Checkpoint.make(memoryview(memory), 2, 4096, 4096)
    memory[4096 : 4096 + len(data)] = data[: size - 4096]
    del memory[size:]
    checkpoint = Checkpoint(memoryview(memory))
    checkpoint.poisoned()
    checkpoint.left()
    for index in range(2):
        slot = checkpoint.slot(index)
        try:
            _, hot, _ = slot.load()
            slot.rings(hot.in_position + 1, hot.out_end, hot)
        except CheckpointError:
            pass


def fuzz_lifeline(data: bytes) -> None:
    _, pieces = _cuts(data)
    beats, orders = LifelineDecoder(3), OrderDecoder()
    try:
        for piece in pieces:
            beats.feed(piece)
    except CorruptLifeline:
        pass
    for piece in pieces:
        orders.feed(piece)


TARGETS = {
    "channel": fuzz_channel,
    "blob": fuzz_blob,
    "tls_records": fuzz_tls_records,
    "checkpoint": fuzz_checkpoint,
    "lifeline": fuzz_lifeline,
    "pack": fuzz_pack,
    "messages": fuzz_messages,
    "request": fuzz_request,
    "response": fuzz_response,
    "blocks": fuzz_blocks,
    "stream": fuzz_stream,
}


def seeds(target: str) -> list[bytes]:
    """Inputs that reach far, for libFuzzer to begin with."""
    packs = [bytes.fromhex(path.read_text()) for path in sorted(DATA.glob("*.hex"))]
    if target in ("pack", "messages"):
        return packs
    if target == "request":
        return [
            b"\xff"
            + http.build_request("POST", http.VPN_TARGET, host="h", content_type="x", body=b)
            for b in packs
        ]
    if target == "response":
        return [b"\xff" + http.build_pack_response(b) for b in packs]
    if target == "channel":
        state = channel.State(1 << 56, 1, b"reply", Mode.BLOCKS, "", 60.0, True, b"blob")
        frames = channel.Frames(1 << 56, channel.join_blocks([bytes(60)]))
        return [channel.encode(state), channel.encode(frames)]
    if target == "blob":
        return [blobs.Blob().encode()]
    if target in ("tls_records", "checkpoint", "lifeline"):
        return [bytes(range(256)) * 4]
    batch = blocks.encode_batch([bytes(14), bytes(60)]) + blocks.encode_keep_alive(b"abc")
    if target == "blocks":
        return [b"\x07" + batch]
    welcome = messages.Welcome("S", "C", bytes(20), 20.0).encode()
    hello = messages.Hello(bytes(20)).to_pack().encode()
    answers = b"".join(http.build_pack_response(pack) for pack in (hello, welcome))
    return [b"\xff" + answers + batch]


def _only_protocol_errors(fuzz: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        try:
            fuzz(data)
        except ProtocolError:
            pass

    return run


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: codecs.py {{{','.join(TARGETS)}}} [libFuzzer options]")
    target = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(seeds(target)):
            Path(folder, str(number)).write_bytes(seed)
        arguments = list(sys.argv)
        # A single file is run alone.  Directories may come before ours: the first takes what
        # is new.
        if not any(Path(word).is_file() for word in arguments[1:]):
            arguments.append(folder)
        atheris.Setup(arguments, _only_protocol_errors(TARGETS[target]))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
