#!/usr/bin/env bash
# cluster/local.sh start [NODES] | stop: a head and NODES (2) nodes on this machine, to try what a cluster does.
# Each node has an address of its own (127.0.0.N), so that Ray takes it for a machine. They take a token, as Ray listens for them on other addresses too.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${GLMAE_LOCAL:-/tmp/glmae-local-$(id -u)}  # short: Ray's sockets lie in it
cpus=${CPUS:-2}
port=${PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}
pids=$folder/pids
PATH=$PWD/.venv/bin:$PATH

# What resources.profile=cluster wants where nodes start (docs/running.md).
export RAY_health_check_period_ms=2000
export RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=4
export RAY_JOB_STOP_WAIT_TIME_S=300
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=25
export RAY_AUTH_MODE=token
unset RAY_ADDRESS

node() {  # NAME OPTION...: a node in a session of its own, which `stop` ends by its number
  local name=$1
  shift
  # Ray gives up on a node that takes over 30 s to start, as on a busy machine: three tries.
  setsid bash -c 'for _ in 1 2 3; do [ -e "$0" ] || "$@"; done' "$folder/up" \
    ray start --block --disable-usage-stats --object-store-memory=200000000 \
    --dashboard-agent-listen-port=0 "$@" > "$folder/$name.log" 2>&1 < /dev/null &
  echo $! >> "$pids"
}

alive() {  # how many nodes Ray counts
  RAY_ADDRESS=127.0.0.1:$port python - 2> /dev/null << 'PYTHON' || echo 0
import os
from ray._raylet import GcsClient

print(len(GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info(timeout=5)))
PYTHON
}

wait_for() {  # NODES
  local leader end=$((SECONDS + 300))
  while [ "$(alive)" -lt "$1" ]; do
    while read -r leader; do
      kill -0 "$leader" 2> /dev/null || end=0
    done < "$pids"
    if [ "$SECONDS" -ge "$end" ]; then
      echo "cluster/local.sh: not all nodes have started; the end of each log:" >&2
      tail -n 3 "$folder"/*.log >&2
      stop
      exit 1
    fi
    sleep 1
  done
}

start() {
  local nodes=$1
  if [ -e "$pids" ]; then
    echo "cluster/local.sh: a cluster is there already ($folder); cluster/local.sh stop ends it" >&2
    exit 2
  fi
  mkdir -p "$folder"
  ray get-auth-token --generate > /dev/null 2>&1
  node head --head --num-cpus=0 --node-ip-address=127.0.0.1 --port="$port" --temp-dir="$folder" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port=$((port + 1))
  wait_for 1
  for number in $(seq "$nodes"); do
    # A folder of its own: where two share one, each unpacks a job's code over that of the other.
    node "node-$number" --address="127.0.0.1:$port" --node-ip-address="127.0.0.$((number + 10))" \
      --num-cpus="$cpus" --temp-dir="$folder/$number"
    wait_for $((number + 1))  # one by one, as two starts take twice as long
  done
  touch "$folder/up"
  cat << TEXT
$nodes nodes with $cpus CPUs each, and a head. Give your runs to it:

  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
  ray job submit --working-dir . -- glmae pretrain configs/pretrain/demo.yaml store=\$PWD/ct.zarr run=\$PWD/runs/first

or in this shell:  RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:$port glmae pretrain ...
End it:            cluster/local.sh stop
TEXT
}

stop() {
  if [ ! -e "$pids" ]; then
    echo "cluster/local.sh: nothing to stop in $folder"
    return
  fi
  # A session ends with its leader, and what the leader leaves is of the same session.
  while read -r leader; do
    pkill -KILL --session "$leader" || true
  done < "$pids"
  rm -rf "$folder"
  echo "stopped"
}

case ${1:-} in
  start) start "${2:-2}" ;;
  stop) stop ;;
  *)
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
    ;;
esac
