#!/usr/bin/env bash
# Copy the run directory here.
#
#   tpu/fetch.sh [--to FOLDER] [--config FILE] [--dry-run]
#
# SLICE_RUN_DIR says from where: gs://..., or a folder on the first worker. Default folder: runs/NAME.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"

to=
own_option() {
  case $1 in --to) to=${2:-} && return 2 ;; esac
}

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_RUN_DIR
to=${to:-runs/$SLICE_NAME}
run mkdir -p "$to"
if [[ $SLICE_RUN_DIR == gs://* ]]; then
  # Only what has changed since the last time.
  run gcloud storage rsync --recursive --project="$SLICE_PROJECT" "$SLICE_RUN_DIR" "$to" ||
    fail "copying $SLICE_RUN_DIR failed"
else
  run gcloud compute tpus tpu-vm scp --recurse "$(nodes | head -n 1):$SLICE_RUN_DIR/." "$to" \
    --project="$SLICE_PROJECT" --zone="$SLICE_ZONE" --worker=0 --quiet || fail "copying $SLICE_RUN_DIR failed"
fi
say "the run is in $to"
