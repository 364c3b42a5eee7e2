#!/usr/bin/env bash
# Delete the slice, or its request that waits in the queue. What is on its disks is lost.
#
#   tpu/delete.sh [--config FILE] [--dry-run]

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE
state=$(request_state)
if [[ $state == UNKNOWN ]]; then fail "can't ask about $SLICE_NAME, so it may be running: is gcloud logged in?"; fi
delete_slice || fail "$SLICE_NAME may still be there and cost money; see tpu/status.sh"
say "$SLICE_NAME is deleted; tpu/status.sh lists what else runs"
