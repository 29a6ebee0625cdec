#!/usr/bin/env bash
# Makes an image with a Rust toolchain and a C compiler, where rust:… cannot be pulled: the base of base-image.sh, and the
# toolchain that is installed here. The Dockerfiles then build the program from sources inside Docker:
#   scripts/builder-image.sh && BUILDER=craton/builder:trixie scripts/images.sh
#   scripts/builder-image.sh [SUITE] [TAG]   default: trixie, craton/builder:trixie
# What is there already stays. REBUILD=1 makes it, and its base, anew.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:-trixie}
tag=${2:-craton/builder:$suite}
say() { printf 'builder-image: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

if [ "${REBUILD:-0}" != 1 ] && docker image inspect "$tag" >/dev/null 2>&1; then
  say "$tag is there"
  exit 0
fi
rustc=$(command -v rustc || echo "$HOME/.cargo/bin/rustc")
[ -x "$rustc" ] || die "there is no rustc here; make setup installs it"
sysroot=$("$rustc" --print sysroot)
[ -x "$sysroot/bin/cargo" ] || die "there is no cargo beside $sysroot/bin/rustc: a toolchain of rustup's has one"
base=craton/base:$suite
scripts/base-image.sh "$suite" "$base"

work=$(mktemp -d "${TMPDIR:-/var/tmp}/craton-builder.XXXXXX")
trap 'rm -rf "$work"' EXIT
cat >"$work/Dockerfile" <<DOCKERFILE
FROM $base
RUN apt-get update \\
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc g++ libc6-dev make cmake git \\
 && apt-get clean && rm -rf /var/lib/apt/lists/*
# The registry is reached as from here, also behind a proxy with an authority of its own.
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
ENV CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt
COPY toolchain /usr/local
DOCKERFILE
cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$work/ca-certificates.crt"
say "making $tag with $("$rustc" --version)"
# One file, which is the whole context.
tar -C "$work" -cf "$work/context.tar" Dockerfile ca-certificates.crt
tar --append --file "$work/context.tar" --transform "s,^\\./,toolchain/," -C "$sysroot" \
  --exclude='./share' --exclude='./lib/rustlib/src' --exclude='./etc' ./bin ./lib ./libexec
docker build --quiet --tag "$tag" - <"$work/context.tar" >/dev/null
say "made $tag: $(docker image inspect --format '{{.Size}}' "$tag" | awk '{printf "%.0f MB", $1 / 1000000}')"
