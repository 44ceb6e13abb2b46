#!/usr/bin/env bash
# sbatch --export=ALL,STORE=/shared/ct.zarr,RUN=/shared/runs/first cluster/slurm.sh [CONFIG.yaml] [key=value ...]
# A run on the nodes of a SLURM job, one Ray node on each. At the time limit it saves and is queued again, and goes on.
# Yours: the lines of #SBATCH, and where .venv is (make install). Two such jobs cannot share a node: `ray symmetric-run`
# ends with `ray stop`.
#SBATCH --job-name=glmae
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=1
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=glmae-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate

# What resources.profile=cluster wants where nodes start (docs/running.md).
export RAY_health_check_period_ms=2000
export RAY_health_check_timeout_ms=5000
export RAY_health_check_failure_threshold=4
export RAY_JOB_STOP_WAIT_TIME_S=300
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=25
# Nodes of one job start minutes apart when a shared disk is busy; Ray waits for 30 s.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# A token of this job: others on these machines cannot use its Ray.
token=$(mktemp "$HOME/.glmae-token.XXXXXX")
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token

nodes=${SLURM_JOB_NUM_NODES:-1}
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(python -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$host"):${PORT:-6379}
driver=$(mktemp -u "${TMPDIR:-/tmp}/glmae-driver.XXXXXX")  # its process; this script runs on the head's node

# Only the run itself is asked to stop: a signal to the step would take Ray from under it.
stop() {
  echo "SIGTERM: the run saves before the time limit"
  [ ! -s "$driver" ] || kill -TERM "$(cat "$driver")"
}
trap stop TERM
trap 'rm -f "$token" "$driver"' EXIT

srun ray symmetric-run --address "$address" --min-nodes "$nodes" \
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats -- \
  env RAY_ADDRESS="$address" bash -c 'echo $$ > "$0" && exec "$@"' "$driver" \
  glmae pretrain "$@" store="$STORE" run="$RUN" resources.profile=cluster &
step=$!

# `wait` comes back when a signal has come, and has to be given again for the end.
while true; do
  wait "$step" && status=0 || status=$?
  kill -0 "$step" 2> /dev/null || break
done
if [ ! -s "$driver" ]; then  # `ray symmetric-run` ends with 0 where Ray does not start
  echo "slurm.sh: the run has not started" >&2
  exit 1
fi
# 143: it was asked to stop, and has saved.
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
