#!/usr/bin/env bash
# Makes a Debian package of a built program: the binary, the services, the documentation.
#   scripts/deb.sh [PROGRAM] [DIRECTORY]     default: target/release/craton, target
set -euo pipefail
cd "$(dirname "$0")/.."
program=${1:-target/release/craton}
into=${2:-target}
die() { printf 'deb: %s\n' "$*" >&2; exit 1; }
[ -x "$program" ] || die "there is no $program; make build makes it"
command -v dpkg-deb >/dev/null || die "dpkg-deb is missing: packages are made on Debian and Ubuntu"

version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
arch=$(dpkg --print-architecture)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/craton_${version}_$arch
install -D -m 755 "$program" "$root/usr/bin/craton"
! command -v strip >/dev/null || strip "$root/usr/bin/craton"
install -D -m 644 -t "$root/usr/lib/systemd/system" packaging/craton-*.service
install -D -m 644 LICENSE "$root/usr/share/doc/craton/copyright"
cp -r docs/guide docs/reference CHANGELOG.md "$root/usr/share/doc/craton/"
install -d -m 755 "$root/etc/craton"

# The oldest glibc that has every function the program asks for.
libc=$(objdump -T "$program" 2>/dev/null | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1 | cut -d_ -f2 || true)
mkdir -p "$root/DEBIAN"
cat >"$root/DEBIAN/control" <<CONTROL
Package: craton
Version: $version
Section: database
Priority: optional
Architecture: $arch
Maintainer: Craton <maintainers@craton-db.example>
Depends: libc6 (>= ${libc:-2.36}), libgcc-s1, postgresql-common
Recommends: postgresql
Description: high availability for PostgreSQL and PostGIS in one program
 Failover that loses no acknowledged row, a pooling proxy whose clients stay
 connected through it, and a backup daemon that follows the leader.
CONTROL
cat >"$root/DEBIAN/postinst" <<'POSTINST'
#!/bin/sh
set -e
# Nothing is started: a service runs once its settings are in /etc/craton, and somebody has enabled it.
chown postgres:postgres /etc/craton
chmod 750 /etc/craton
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
POSTINST
chmod 755 "$root/DEBIAN/postinst"
dpkg-deb --root-owner-group --build "$root" "$into" >/dev/null
printf '%s\n' "$into/craton_${version}_$arch.deb"
