#!/usr/bin/env bash
# Ask for a slice of TPU VMs and wait until it is there.
#
#   tpu/create.sh [--config FILE] [--dry-run]
#
# The request is a queued resource: without capacity it waits its turn, for SLICE_WAIT_S seconds
# here and for good at Google. It costs nothing until it is granted. tpu/delete.sh ends it.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE
version=$(runtime_version)
num_chips=$(($(chips "$SLICE_ACCELERATOR_TYPE") * SLICE_COUNT))

state=$(request_state ABSENT)
case $state in
  ABSENT) ;;
  UNKNOWN) fail "can't ask about $SLICE_NAME: is gcloud logged in, is the TPU API enabled?" ;;
  *) fail "$SLICE_NAME exists already and is $state; go on with tpu/setup.sh, or tpu/delete.sh" ;;
esac

say "$SLICE_NAME: $SLICE_COUNT x $SLICE_ACCELERATOR_TYPE, $SLICE_TIER, $version: $(cost "$num_chips")"
trap tell_what_runs EXIT
request_slice || fail "the request was refused (quota, zone or name?); what gcloud said is above"

outcome=0
wait_until_active "$SLICE_WAIT_S" || outcome=$?
case $outcome in
  0) say "$SLICE_NAME is there; next: tpu/setup.sh" ;;
  2) fail "no capacity within $SLICE_WAIT_S s. The request stays in the queue: when it is granted, it costs" ;;
  *) fail "$SLICE_NAME was not granted: $(request_state)" ;;
esac
