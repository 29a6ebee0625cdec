#!/usr/bin/env bash
# Installs what building and running needs and this machine lacks, on Debian and Ubuntu: PostgreSQL with
# PostGIS, a C compiler and linker, curl, Rust. Says what it does; does nothing where nothing is missing.
# With --tests also what only tests need: etcd, Patroni, repmgr, and for the images what --images installs. SETUP_SKIP=1 leaves everything as it is.
set -euo pipefail
[ "${SETUP_SKIP:-0}" = 1 ] && exit 0
# Programs of the administrator's are not on every user's path, and may be there all the same.
export PATH="$PATH:$HOME/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# The newest installed server, for example 15; empty if there is none.
server_major() {
  local dir
  for dir in $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -Vr); do
    [ -x "$dir/postgres" ] && { basename "$(dirname "$dir")"; return; }
  done
}

postgis_there() {
  [ -e "/usr/share/postgresql/$1/extension/postgis.control" ]
}

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v make >/dev/null || missing+=(make)
command -v curl >/dev/null || missing+=(curl ca-certificates)
command -v psql >/dev/null || missing+=(postgresql-client)
# Tests on hosts of their own (network namespaces) are for root.
if [ "$(id -u)" = 0 ]; then
  command -v ip >/dev/null || missing+=(iproute2)
  command -v nft >/dev/null || missing+=(nftables)
  command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
  [ -e /usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1 ] || [ "$(uname -m)" != x86_64 ] || missing+=(libfaketime)
fi
major=$(server_major)
[ -n "$major" ] || missing+=(postgresql)
if [ -n "$major" ] && ! postgis_there "$major"; then
  missing+=("postgresql-$major-postgis-3")
fi

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null; then say "asking for sudo: $*"; sudo "$@"
  else die "not root, and no sudo, to do this. As root:$(printf ' %q' "$@")"
  fi
}

# A fresh machine brings itself up to date, and holds apt's locks meanwhile; for the one of the lists apt does not wait
# by itself. Lists that cannot be had now may be there from before.
update_lists() {
  local said tries=60
  while ! said=$(as_root env LC_ALL=C sh -c 'apt-get update -qq 2>&1'); do
    case $said in
      *"Could not get lock"*) [ "$tries" -gt 0 ] || break ;;
      *) break ;;
    esac
    [ "$tries" -lt 60 ] || say "waiting for another apt-get, for at most five minutes"
    tries=$((tries - 1))
    sleep 5
  done
  [ -z "$said" ] || say "apt-get update: $said"
}

# The distribution starts a server of its own after installing one. Craton's clusters need none.
install_packages() {
  command -v apt-get >/dev/null || die "this is no Debian or Ubuntu; install by its own means what these packages hold: $*"
  say "installing: $*"
  # What an earlier installation left half-done stops every later one.
  [ -z "$(dpkg --audit 2>/dev/null)" ] || as_root env DEBIAN_FRONTEND=noninteractive dpkg --configure -a >&2 || true
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" >&2
}

# What the tests start by themselves: etcd, and the systems that a database comes from when it is moved. The packages
# would start and enable services: a policy that says no to that stands while they are installed, and goes away with
# the script, whatever happens.
install_for_tests() {
  [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || as_root apt-get install -y "$@"
  local policy=/usr/sbin/policy-rc.d
  # One of an earlier run that was killed is ours as well.
  if [ ! -e "$policy" ] || grep -q 'while craton installs' "$policy"; then
    as_root sh -c "printf '#!/bin/sh\n# while craton installs what its tests need\nexit 101\n' > $policy && chmod 755 $policy"
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  update_lists
  install_packages "$@"
  if [ -d /run/systemd/system ]; then
    for service in etcd patroni repmgrd; do as_root systemctl disable --quiet "$service.service" 2>/dev/null || true; done
  fi
}

# What building and testing images needs beside an engine, which is not installed here: running one is a decision.
images_missing=()
if [ "${1:-}" = --images ] || { [ "${1:-}" = --tests ] && docker version >/dev/null 2>&1; }; then
  command -v debootstrap >/dev/null || images_missing+=(debootstrap)
  command -v docker-compose >/dev/null || docker compose version >/dev/null 2>&1 || images_missing+=(docker-compose)
fi
if [ "${#images_missing[@]}" -gt 0 ]; then
  update_lists
  install_packages "${images_missing[@]}"
fi

if [ "${#missing[@]}" -gt 0 ]; then
  command -v apt-get >/dev/null || die "this is no Debian or Ubuntu; install by its own means what these packages hold: ${missing[*]}"
  update_lists
  install_packages "${missing[@]}"
fi
# A server that came just now: its PostGIS has the same major version in the name.
major=$(server_major)
[ -n "$major" ] || die "there is still no PostgreSQL server below /usr/lib/postgresql; install the package postgresql"
postgis_there "$major" || install_packages "postgresql-$major-postgis-3"

if [ "${1:-}" = --tests ]; then
  tests_missing=()
  { command -v etcd && command -v etcdctl; } >/dev/null || tests_missing+=(etcd-server etcd-client)
  command -v patroni >/dev/null || tests_missing+=(patroni python3-etcd)
  [ -x "/usr/lib/postgresql/$major/bin/repmgr" ] || tests_missing+=("postgresql-$major-repmgr")
  [ "${#tests_missing[@]}" -eq 0 ] || install_for_tests "${tests_missing[@]}"
fi

if ! command -v cargo >/dev/null; then
  say "installing Rust with rustup into $HOME/.cargo (https://rustup.rs)"
  curl --proto '=https' --tlsv1.2 -sSf --retry 3 https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy --component rustfmt >&2 \
    || die "Rust could not be installed; install it from https://rustup.rs and run this again"
fi
version=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
read -r rust_major rust_minor <<<"${version:-0 0}"
if [ "$rust_major" -lt 1 ] || { [ "$rust_major" -eq 1 ] && [ "$rust_minor" -lt 90 ]; }; then
  die "$(command -v cargo) is $(cargo --version 2>/dev/null || echo broken); 1.90 or newer is needed: install it from https://rustup.rs (or run 'rustup update')"
fi
