"""Service Mode: the VPN server as a unit of systemd."""
