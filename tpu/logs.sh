#!/usr/bin/env bash
# Show what the command on a worker prints, and follow it. Ctrl-C ends the following, not the run.
#
#   tpu/logs.sh [--worker N|all] [--node NAME] [--lines N] [--no-follow] [--config FILE] [--dry-run]

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"

worker=0 node='' lines=50 follow=true
own_option() {
  case $1 in
    --worker) worker=${2:-} && return 2 ;;
    --node) node=${2:-} && return 2 ;;
    --lines) lines=${2:-} && return 2 ;;
    --no-follow) follow=false && return 1 ;;
  esac
}

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE
[[ $worker == all || $worker =~ ^[0-9]+$ ]] || wrong "--worker is '$worker'; a number or all"
[[ $lines =~ ^[0-9]+$ ]] || wrong "--lines is '$lines', not a whole number"
command="bash llama-jax/tpu/worker.sh log --lines=$lines"
if $follow; then command+=" --follow=name --retry"; fi
on "${node:-$(nodes | head -n 1)}" "$worker" "$command"
