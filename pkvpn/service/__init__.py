"""Service Mode: the VPN server in the machine's init system."""
