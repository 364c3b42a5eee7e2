#!/usr/bin/env bash
# List every TPU node and request of the project, in all zones, with chips and what they cost.
#
#   tpu/status.sh [--config FILE] [--dry-run]
#
# Costs are chips x SLICE_PRICE_PER_CHIP_HOUR: one price for all, so of one kind of chip only.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"

read_arguments "$@"
read_settings
need SLICE_PROJECT

rows=$(ask '' gcloud compute tpus tpu-vm list --project="$SLICE_PROJECT" --zone=- \
  --format='value(name.basename(),zone.basename(),acceleratorType.basename(),state)') ||
  fail "can't list nodes: is gcloud logged in, is the TPU API enabled?"
running=0
while read -r name zone type state; do
  [[ -n $name ]] || continue
  num_chips=$(chips "$type")
  say "node $name, $zone, $type, $state: $(cost "$num_chips")"
  # A node that was preempted or stopped isn't charged.
  if [[ $state == READY ]]; then running=$((running + num_chips)); fi
done <<<"$rows"
requests=$(ask '' gcloud compute tpus queued-resources list --project="$SLICE_PROJECT" --zone=- \
  --format='value(name.basename(),state.state)') || fail "can't list requests"
while read -r name state; do
  if [[ -n $name ]]; then say "request $name, $state"; fi
done <<<"$requests"
if ((running)); then say "running: $(cost "$running")"; else say "nothing is running"; fi
