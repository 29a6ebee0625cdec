#!/usr/bin/env bash
# Builds the three images: craton/postgis, craton/proxy, craton/backup. Works where no image can be pulled.
#   TAG=latest            what they are tagged with
#   BASE=… BUILDER=…      images to build on, instead of the Dockerfiles' own
#   CRATON_BIN=FILE       take this program instead of building it
#   IMAGES="postgis …"    only these
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'images: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
command -v docker >/dev/null || die "there is no docker here; install docker.io"
docker version >/dev/null 2>&1 || die "no Docker engine answers; start dockerd, or use a user who may reach it"

# True if the image is here, or can be had within five minutes; where there is no registry, that is known at once.
can_have() {
  docker image inspect "$1" >/dev/null 2>&1 || timeout 300 docker pull --quiet "$1" >/dev/null 2>&1
}
default_of() { sed -n "s/^ARG $1=//p" docker/Dockerfile.postgis; }

if [ -z "${BASE:-}" ]; then
  BASE=$(default_of BASE)
  if ! can_have "$BASE"; then
    say "$BASE cannot be pulled: a base is made from Debian's packages"
    suite=${BASE#debian:}
    BASE=craton/base:${suite%-slim}
    if [ "${REBUILD:-0}" = 1 ] || ! docker image inspect "$BASE" >/dev/null 2>&1; then
      # debootstrap needs root.
      as_root=
      [ "$(id -u)" = 0 ] || ! command -v sudo >/dev/null || as_root="sudo -E"
      $as_root scripts/base-image.sh "${suite%-slim}" "$BASE"
    fi
  fi
fi

staged=
if [ -z "${CRATON_BIN:-}" ] && [ -z "${BUILDER:-}" ]; then
  BUILDER=$(default_of BUILDER)
  if ! can_have "$BUILDER"; then
    say "$BUILDER cannot be pulled: the program is built here"
    BUILDER=
    cargo=$(command -v cargo || echo "$HOME/.cargo/bin/cargo")
    CARGO_PROFILE_RELEASE_STRIP=symbols "$cargo" build --release --locked -p craton
    CRATON_BIN=${CARGO_TARGET_DIR:-target}/release/craton
  fi
fi
if [ -n "${CRATON_BIN:-}" ]; then
  # A directory that the build's context includes; what is built from sources never sees it.
  # The same for all runs, as its name is part of what Docker keeps; so runs wait for one another.
  exec 9<docker
  flock 9
  staged=docker/.program
  install -D -m 755 "$CRATON_BIN" "$staged/craton"
  ! command -v strip >/dev/null || strip "$staged/craton"
  trap 'rm -rf docker/.program' EXIT
fi

build() {
  docker build --quiet --file "docker/Dockerfile.$name" --tag "craton/$name:${TAG:-latest}" \
    --build-arg "BASE=$BASE" --build-arg "BUILDER=${BUILDER:-$BASE}" \
    --build-arg "CRATON_BIN=${staged:+$staged/craton}" \
    --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || true)" . >/dev/null
}
for name in ${IMAGES:-postgis proxy backup}; do
  say "building craton/$name:${TAG:-latest} on $BASE"
  # Packages come from a mirror, which may be changing at this moment.
  build || { say "once more"; sleep 10; build; }
done
docker image ls --format 'table {{.Repository}}\t{{.Tag}}\t{{.Size}}' --filter reference='craton/*'
