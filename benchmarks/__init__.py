"""Programs that measure pkvpn, beside SoftEther and other supervisors; see README.md."""
