"""The data plane: TLS, framing, known flows."""
