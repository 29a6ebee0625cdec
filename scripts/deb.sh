#!/usr/bin/env bash
# Makes a Debian package of a built program: the binary, the services, the documentation, a manual page.
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
maintainer='Craton <maintainers@craton-db.example>'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/craton_${version}_$arch
install -D -m 755 "$program" "$root/usr/bin/craton"
! command -v strip >/dev/null || strip "$root/usr/bin/craton"
install -D -m 644 -t "$root/usr/lib/systemd/system" packaging/craton-*.service
doc=$root/usr/share/doc/craton
install -d -m 755 "$doc" "$root/usr/share/man/man1" "$root/etc/craton"
{ printf 'Copyright: the Craton authors\nLicense: Apache-2.0, which on Debian is in /usr/share/common-licenses/Apache-2.0\n\n'; cat LICENSE; } >"$doc/copyright"
cp -r docs/. CHANGELOG.md SECURITY.md "$doc/"
# What is in docs/ of the sources is one level higher here.
sed -i 's|](\.\./\.\./SECURITY\.md)|](../SECURITY.md)|' "$doc/guide/security.md"
sed -i 's|docs/guide/|guide/|g' "$doc/SECURITY.md"
# Of the last commit, so that the same sources make the same package.
date=$(git log -1 --format=%cD 2>/dev/null || date -R)
printf 'craton (%s) unstable; urgency=medium\n\n  * What changed is in CHANGELOG.md.\n\n -- %s  %s\n' "$version" "$maintainer" "$date" \
  | gzip -9n >"$doc/changelog.gz"
gzip -9nc packaging/craton.1 >"$root/usr/share/man/man1/craton.1.gz"
find "$root/usr/share" -type f -exec chmod 644 {} + -o -type d -exec chmod 755 {} +

# The oldest glibc that has every function the program asks for.
libc=$(objdump -T "$program" 2>/dev/null | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1 | cut -d_ -f2 || true)
mkdir -p "$root/DEBIAN"
(cd "$root" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"
cat >"$root/DEBIAN/control" <<CONTROL
Package: craton
Version: $version
Section: database
Priority: optional
Architecture: $arch
Maintainer: $maintainer
Homepage: https://github.com/craton-db/craton
Installed-Size: $(du -sk "$root" | cut -f1)
Depends: libc6 (>= ${libc:-2.36}), libgcc-s1, postgresql-common
Recommends: postgresql
Description: high availability for PostgreSQL and PostGIS in one program
 Failover that loses no acknowledged row, a pooling proxy whose clients stay
 connected through it, and a backup daemon that follows the leader.
CONTROL
cat >"$root/DEBIAN/postinst" <<'POSTINST'
#!/bin/sh
set -e
# Nothing is started: a service runs once its settings are in /etc/craton, and somebody has enabled it. Nothing is
# restarted either: daemons run on with the program that they were started with.
if [ "$1" = configure ] && [ -z "$2" ]; then
  chown postgres:postgres /etc/craton
  chmod 750 /etc/craton
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
POSTINST
cat >"$root/DEBIAN/prerm" <<'PRERM'
#!/bin/sh
set -e
# Without the program nobody would look after PostgreSQL: it is stopped in order, and another member takes over.
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
  for name in proxy backup node witness; do systemctl stop "craton-$name.service" || true; done
fi
PRERM
cat >"$root/DEBIAN/postrm" <<'POSTRM'
#!/bin/sh
set -e
# Settings and secrets in /etc/craton, databases and backups stay, also after a purge: they are not the package's.
if [ "$1" = purge ]; then
  for name in proxy backup node witness; do rm -f "/etc/systemd/system/multi-user.target.wants/craton-$name.service"; done
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
POSTRM
chmod 755 "$root"/DEBIAN/post* "$root/DEBIAN/prerm"
dpkg-deb --root-owner-group --build "$root" "$into" >/dev/null
printf '%s\n' "$into/craton_${version}_$arch.deb"
