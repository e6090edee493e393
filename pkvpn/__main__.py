"""`python -m pkvpn`, also installed as `vpnserver`."""

import sys

from pkvpn.cli import main

if __name__ == "__main__":
    sys.exit(main())
