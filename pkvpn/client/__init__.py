"""Our own client: for users (`pkvpn connect`), for the canary and for the load generator.

Strategy: `machine` is pure and decides, `session` is the shell with the socket.
"""
