"""Our client against SoftEther's own server, in namespaces that end with the test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# Its state goes to memory that only this mount namespace sees; vpncmd spins for ever on a
# prompt without input, so it is bounded.
SCRIPT = """
set -eu
ip link set lo up
for d in /run /var/log /var/lib; do mount -t tmpfs none $d; mkdir $d/softether; done
/usr/libexec/softether/vpnserver/vpnserver start >/dev/null </dev/null
printf '%s\\n' 'ServerPasswordSet admin' 'HubCreate T /PASSWORD:hub' 'Hub T' \
  'UserCreate u1 /GROUP:none /REALNAME:none /NOTE:none' 'UserPasswordSet u1 /PASSWORD:pw1' \
  'UserCreate u2 /GROUP:none /REALNAME:none /NOTE:none' 'UserPasswordSet u2 /PASSWORD:pw2' \
  'Flush' >/run/commands
for attempt in 1 2 3 4 5 6 7 8; do
  sleep 0.5
  if timeout 20 vpncmd localhost:443 /SERVER /IN:/run/commands </dev/null >/run/said 2>&1
  then break; fi
  if [ $attempt = 8 ]; then cat /run/said; exit 1; fi
done
exec "$PYTHON" -m tests.client.against_real_server
"""


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.netns
@pytest.mark.softether
def test_login_frames_resumption_refusals_and_the_verb_connect() -> None:
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        ["unshare", *namespaces, "bash", "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
