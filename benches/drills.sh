#!/usr/bin/env bash
# Measures failovers with `craton drill` on a cluster of its own, and prints a table of medians.
#
#   benches/drills.sh [path/to/craton] [runs]     BENCH_LOAD_SECONDS=600  how long the load test runs (0: not)
#   BENCH_MIXED=50  how many mixed drills         BENCH_BASE_PORT=26400
#
# Needs python3 (for the table) and pgbench.
set -euo pipefail
craton=${1:-target/release/craton}
runs=${2:-5}
load_seconds=${BENCH_LOAD_SECONDS:-600}
mixed=${BENCH_MIXED:-50}
port=${BENCH_BASE_PORT:-26400}
dir=$(mktemp -d -u "${TMPDIR:-/tmp}/craton-bench-XXXXXX")
results=$(mktemp -d)
trap '"$craton" --dir "$dir" down --purge >/dev/null 2>&1 || true; rm -rf "$results"' EXIT

"$craton" --dir "$dir" up --base-port "$port" --no-sample >&2
for drill in kill-primary kill-host freeze-primary kill-agent freeze-agent switchover; do
  echo "drill $drill, $runs times" >&2
  "$craton" --dir "$dir" --json drill "$drill" --count "$runs" >"$results/$drill.json" || echo "  $drill: exit $?" >&2
done
if [ "$mixed" -gt 0 ]; then
  echo "mixed drills: $mixed" >&2
  "$craton" --dir "$dir" --json drill mixed --count "$mixed" --seed 1 >"$results/mixed.json" || echo "  mixed: exit $?" >&2
fi
if [ "$load_seconds" -gt 0 ]; then
  pgbench=$(ls /usr/lib/postgresql/*/bin/pgbench | sort -V | tail -n 1)
  term() { "$craton" --dir "$dir" --json status | python3 -c 'import json,sys; print(json.load(sys.stdin)["term"])'; }
  export PGPASSFILE=$results/pgpass
  install -m 600 "$dir/secrets/pgpass" "$PGPASSFILE"
  conn=(-h 127.0.0.1 -p $((port + 2)) -U postgres postgres)
  "$pgbench" -i -q -s 20 "${conn[@]}" >/dev/null 2>&1
  before=$(term)
  echo "load: pgbench with 32 clients for $load_seconds s" >&2
  "$pgbench" -n -c 32 -j 2 -T "$load_seconds" "${conn[@]}" >"$results/load.txt" 2>&1 || true
  echo "$before $(term)" >"$results/terms"
fi
python3 - "$results" <<'PY'
import json, pathlib, statistics, sys
place = pathlib.Path(sys.argv[1])
print("| drill | runs | outage, median (max) | errors, median | unknown, median | sessions lost | rows lost | whole again, median |")
print("|---|---|---|---|---|---|---|---|")
for name in ["kill-primary", "kill-host", "freeze-primary", "kill-agent", "freeze-agent", "switchover", "mixed"]:
    path = place / f"{name}.json"
    try:
        s = json.loads(path.read_text())
    except (OSError, ValueError):
        continue
    d = s["drills"]
    med = lambda k: statistics.median(x[k] for x in d)
    whole = [x["redundancy_ms"] for x in d if x["redundancy_ms"] is not None]
    lost = max([s2["lost"] for s2 in s["servers"]] + [sum(x["lost"] for x in d)])
    again = f"{statistics.median(whole) / 1000:.1f} s" if len(whole) == len(d) else f"{len(d) - len(whole)} of {len(d)} not in time"
    print(f"| {name} | {len(d)} | {med('outage_ms') / 1000:.2f} s ({max(x['outage_ms'] for x in d) / 1000:.2f}) | {med('errors'):g} | {med('unknown'):g} | {sum(x['sessions_lost'] for x in d)} | {lost} of {s['acknowledged']} | {again} |")
terms = place / "terms"
if terms.exists():
    before, after = terms.read_text().split()
    print(f"\nload on all cores: term {before} before, {after} after ({'no failover' if before == after else 'A FAILOVER'})")
    for line in (place / "load.txt").read_text().splitlines():
        if line.startswith(("tps", "number of transactions actually", "number of failed")):
            print("  " + line)
PY
