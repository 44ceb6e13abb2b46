#!/usr/bin/env bash
# cluster/node.sh aws|gcp ray start --block ...: a node, and the cloud's notice that it will be taken.
# SIGTERM has `ray start --block` drain: the run saves a checkpoint and goes on elsewhere.
set -u
cloud=$1
shift
metadata=${GLMAE_METADATA:-http://169.254.169.254}

is_taken() {
  if [ "$cloud" = aws ]; then
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") || return 1
    # Not there (404) until two minutes before.
    curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action"
  else
    [ "$(curl -sf -m 2 -H 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted")" = TRUE ]
  fi
}

"$@" &
node=$!
trap 'kill -TERM "$node"' TERM INT
until is_taken; do
  kill -0 "$node" 2> /dev/null || break
  sleep 2
done
kill -TERM "$node" 2> /dev/null && echo "$cloud takes this node; it drains"
wait "$node"
