"""A SoftEther-compatible VPN server whose process tree heals itself.

Nothing is imported here: `vpnserver status` must not pay for what it does not use.
"""

# A literal, read by setup.py with a regular expression and by the command line
# without importlib.metadata (40 ms).
__version__ = "0.1.0"
