"""The least that a respawn can cost: a preloaded parent that holds the listener, and forks.

    python -m benchmarks.peers.floors fork|standby PORT CERTIFICATE KEY PIDFILE

fork: the parent waits for the server's end and forks the next.  standby: the next one is there
already and is told to begin.  No heartbeat, no evidence, no report, no limit.  The server answers
each TLS connection's first bytes with a short HTTP reply; PIDFILE holds the pid that serves.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def serve(listener: socket.socket, context: ssl.SSLContext, pid_file: int) -> None:
    """Accept for ever; a thread for each connection."""
    os.pwrite(pid_file, f"{os.getpid():<10}".encode(), 0)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, context), daemon=True).start()


def answer(connection: socket.socket, context: ssl.SSLContext) -> None:
    """One request, one reply."""
    connection.settimeout(5.0)
    try:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(4096)
            tls.sendall(ANSWER)
    except OSError:
        connection.close()  # whoever knocked left again


def fork_loop(listener: socket.socket, context: ssl.SSLContext, pid_file: int) -> None:
    """Fork, wait, again."""
    while True:
        pid = os.fork()
        if not pid:
            serve(listener, context, pid_file)
        os.waitpid(pid, 0)


def standby_loop(listener: socket.socket, context: ssl.SSLContext, pid_file: int) -> None:
    """The same with one child in advance, which waits at a pipe."""
    serving = 0
    while True:
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writing)
            if not os.read(reading, 1):
                os._exit(0)
            serve(listener, context, pid_file)
        os.close(reading)
        if serving:
            os.waitpid(serving, 0)
        os.write(writing, b"!")
        os.close(writing)
        serving = pid


def main(kind: str, port: str, certificate: str, key: str, pid_path: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", int(port)), backlog=4096)
    pid_file = os.open(pid_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    {"fork": fork_loop, "standby": standby_loop}[kind](listener, context, pid_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
