#!/usr/bin/env bash
# Installs what the comparison needs and nothing else does: etcd and HAProxy from Debian's packages, Patroni from
# PyPI in a virtual environment.
#
#   benches/failover/install.sh DIRECTORY_OF_THE_ENVIRONMENT
set -euo pipefail
venv=$1
missing=()
command -v etcd >/dev/null || missing+=(etcd-server)
command -v haproxy >/dev/null || missing+=(haproxy)
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ "${#missing[@]}" -gt 0 ]; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
fi
if ! "$venv/bin/patroni" --version >/dev/null 2>&1; then
  # The system's own python: the members run as the user postgres, who must be able to reach it.
  /usr/bin/python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet 'patroni[etcd3]==4.1.5' 'psycopg[binary]==3.3.9'
fi
"$venv/bin/patroni" --version >&2
