#!/usr/bin/env bash
# Makes the image that the others are built on, where none can be pulled: debootstrap, then docker import.
#   scripts/base-image.sh [SUITE] [TAG]      default: trixie, craton/base:trixie
# What is there already stays. MIRROR=… for another Debian mirror, REBUILD=1 to make it anew.
set -euo pipefail
suite=${1:-trixie}
tag=${2:-craton/base:$suite}
mirror=${MIRROR:-http://deb.debian.org/debian}

say() { printf 'base-image: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

if [ "${REBUILD:-0}" != 1 ] && docker image inspect "$tag" >/dev/null 2>&1; then
  say "$tag is there"
  exit 0
fi
[ "$(id -u)" = 0 ] || die "debootstrap needs root: run this with sudo, or docker pull debian:$suite-slim where that is possible"
command -v debootstrap >/dev/null || die "debootstrap is missing; scripts/setup.sh --tests installs it"

work=$(mktemp -d "${TMPDIR:-/var/tmp}/craton-base.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
say "making $tag from $mirror (about a minute)"
for try in 1 2 3; do
  # A mirror may be changing at this moment.
  ! debootstrap --variant=minbase --include=ca-certificates "$suite" "$work/root" "$mirror" >"$work/log" 2>&1 || break
  tail -20 "$work/log" >&2
  [ "$try" -lt 3 ] || die "debootstrap failed"
  rm -rf --one-file-system "$work/root"
  sleep 10
done

# A container has no services to start and no use for manuals; packages put in later leave these out as well.
root=$work/root
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
cat >"$root/etc/dpkg/dpkg.cfg.d/slim" <<'CFG'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
CFG
printf 'Acquire::Languages "none";\nAPT::AutoRemove::SuggestsImportant "false";\n' >"$root/etc/apt/apt.conf.d/slim"
if [ "$suite" != sid ]; then
  cat >"$root/etc/apt/sources.list" <<LIST
deb $mirror $suite main
deb $mirror $suite-updates main
deb ${SECURITY_MIRROR:-http://deb.debian.org/debian-security} $suite-security main
LIST
fi
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/man "$root"/usr/share/info "$root"/usr/share/locale
find "$root/usr/share/doc" -type f ! -name copyright -delete
find "$root/usr/share/doc" -xtype l -delete
mkdir -p "$root/usr/share/locale"
: >"$root/etc/machine-id"
rm -f "$root/etc/hostname" "$root/etc/resolv.conf"

tar -C "$root" --numeric-owner --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -cf - . \
  | docker import --change 'CMD ["bash"]' --change "LABEL org.opencontainers.image.title=debian-$suite-minimal" - "$tag" >/dev/null
say "made $tag: $(docker image inspect --format '{{.Size}}' "$tag" | awk '{printf "%.0f MB", $1 / 1000000}')"
