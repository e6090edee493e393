"""What the core is told when it is started; nothing heavy, the watchdog builds it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CoreSettings:
    """Times in seconds."""

    # The database and the secret of the session keys are in here.
    state_dir: str
    # Shown by clients.
    server_name: str = "pkvpn"
    # T of the protocol: a client reconnects for so long, and whoever is silent for longer is gone.
    session_timeout: float = 60.0
    # TCP connections of one session.
    max_connections: int = 32
    # An address that was not seen for so long is not known any more.
    mac_ageing: float = 600.0
    # Addresses of one hub; one port may have a quarter of them.
    max_macs: int = 16384
    # Frames a second that one session may have flooded, unless its hub says otherwise.
    storm_frames: int = 10_000
    # Failed logins at once, and then one more in so many seconds: of an address, of a user.
    address_failures: int = 20
    address_failure_interval: float = 2.0
    user_failures: int = 50
    user_failure_interval: float = 2.0
    # How long a new core waits for the edges to tell what there is before it serves.
    replay_timeout: float = 2.0
    # Bridges whose TAP the system did not give, and why; asked in the core.
    refused_bridges: Callable[[], Mapping[str, str]] = dict
