#!/usr/bin/env bash
# Start the same command on every worker, detached: it goes on when this terminal closes.
#
#   tpu/launch.sh [--config FILE] [--dry-run] -- llama-jax train pretrain/llama3.1-8b-v5e-16
#
# A `llama-jax train` without --run-dir gets SLICE_RUN_DIR's. tpu/logs.sh follows what it prints.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"
# shellcheck source=tpu/job.sh
source "$HERE/job.sh"

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE
read_command
trap tell_what_runs EXIT
check_run_dir
start_job || fail "not every worker started it; tpu/watch.sh starts it again, tpu/logs.sh shows why"
say "started on every worker; follow it with tpu/logs.sh, keep it going with tpu/watch.sh -- ..."
