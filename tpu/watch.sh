#!/usr/bin/env bash
# Keep a command running on a slice until it succeeds: start it, look at it every SLICE_POLL_S
# seconds, and after a preemption delete the slice, ask for it again, set it up and start again.
#
#   tpu/watch.sh [--max-restarts N] [--max-failures N] [--delete-when-done] [--config FILE]
#                [--dry-run] -- llama-jax train pretrain/llama3.1-8b-v5e-16
#
# --max-restarts  new slices after preemptions or dead workers; 0, the default: no bound
# --max-failures  times that the command itself may fail in a row; default 3. A failure after
#                 half an hour of running starts a new row
#
# Training goes on from its last checkpoint by itself. Waiting for capacity has no bound. Runs where
# you start it: keep it alive with tmux or nohup. When it ends, the slice is still there unless
# --delete-when-done is given.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"
# shellcheck source=tpu/job.sh
source "$HERE/job.sh"

max_restarts=0 max_failures=3 delete_when_done=false
own_option() {
  case $1 in
    --max-restarts) max_restarts=${2:-} && return 2 ;;
    --max-failures) max_failures=${2:-} && return 2 ;;
    --delete-when-done) delete_when_done=true && return 1 ;;
  esac
}

LONG_S=1800   # a run of this length was no failure at the start
SILENT_LOOKS=3 # looks without an answer of every worker before the slice counts as dead

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE
[[ $max_restarts =~ ^[0-9]+$ && $max_failures =~ ^[0-9]+$ ]] || wrong "--max-restarts and --max-failures are whole numbers"
read_command

restarts=0 failures=0 silent=0 started_s=$SECONDS workers=0
same=(--config "${CONFIG:-/dev/null}")
if [[ -z $CONFIG ]]; then same=(); fi
if $DRY_RUN; then same+=(--dry-run); fi

# What these print about the slice would be said twice.
other() { "$HERE/$1.sh" "${same[@]}" 2> >(grep -v 'Delete it with' >&2); }

count_workers() {
  local node number
  workers=0
  for node in $(nodes); do
    number=$(num_workers "$node") || number=1
    workers=$((workers + ${number:-1}))
  done
}

launch() {
  say "starting: ${COMMAND[*]}"
  check_run_dir
  count_workers
  started_s=$SECONDS silent=0
  start_job || warn "not every worker started it; looking again in $SLICE_POLL_S s"
}

# Ask for the slice until it is granted, however often a request fails or is taken away at once.
create_again() {
  while true; do
    say "asking for $SLICE_NAME, waiting for capacity without a bound"
    if [[ $(request_state ABSENT) == ABSENT ]]; then request_slice || true; fi
    if wait_until_active 0; then return; fi
    warn "not granted ($(request_state)); asking again in $SLICE_POLL_S s"
    delete_slice || true
    pause
  done
}

replace_slice() {
  restarts=$((restarts + 1))
  if ((max_restarts > 0 && restarts > max_restarts)); then
    fail "$1; already restarted $max_restarts times (--max-restarts)"
  fi
  say "$1; restart $restarts$( ((max_restarts)) && echo " of $max_restarts" || echo ", no bound")"
  until delete_slice; do
    warn "deleting $SLICE_NAME failed; again in $SLICE_POLL_S s"
    pause
  done
  create_again
  until other setup; do
    # Taken away during the set-up: the next look says so.
    [[ $(request_state) == ACTIVE ]] || return 0
    warn "setting up failed; again in $SLICE_POLL_S s"
    pause
  done
  launch
}

# One look at the nodes: empty when all is well, else what is wrong.
slice_trouble() {
  local node state
  state=$(request_state)
  case $state in
    ACTIVE) ;;
    UNKNOWN | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | CREATING) return 0 ;;
    *) echo "$SLICE_NAME is $state" && return 0 ;;
  esac
  for node in $(nodes); do
    state=$(node_state "$node")
    case $state in
      READY | UNKNOWN | CREATING | STARTING | RESTARTING | REPAIRING) ;;
      *) echo "node $node is $state" && return 0 ;;
    esac
  done
}

finish() {
  say "done: the command succeeded on every worker, after $restarts restarts"
  if $delete_when_done; then
    delete_slice || fail "deleting $SLICE_NAME failed: it may still cost money"
    trap - EXIT
    say "$SLICE_NAME is deleted"
  fi
  exit 0
}

# One look at the command on every worker.
look_at_job() {
  local states answered code
  states=$(job_states)
  answered=$(grep -c . <<<"$states" || true)
  if ((answered < workers)); then
    silent=$((silent + 1))
    warn "$answered of $workers workers answer ($silent of $SILENT_LOOKS looks)"
    if ((silent >= SILENT_LOOKS)); then replace_slice "a worker is dead"; fi
    return 0
  fi
  silent=0
  code=$(grep -oE 'exited [1-9][0-9]*' <<<"$states" | head -n 1 || true)
  if [[ -n $code ]]; then
    if ((SECONDS - started_s >= LONG_S)); then failures=0; fi
    failures=$((failures + 1))
    if ((failures > max_failures)); then
      fail "the command ${code/exited/failed with code}, $failures times in a row (--max-failures $max_failures); see tpu/logs.sh"
    fi
    say "the command ${code/exited/failed with code} (failure $failures of $max_failures in a row); stopping it everywhere and starting again"
    stop_job
    launch
  elif ! grep -qv '^exited 0$' <<<"$states"; then
    finish
  elif grep -q '^absent$' <<<"$states"; then
    launch
  fi
}

trap tell_what_runs EXIT
count_workers
if [[ $(request_state) == ABSENT ]]; then
  create_again
  other setup || fail "setting up failed"
fi
while true; do
  trouble=$(slice_trouble)
  if [[ -n $trouble ]]; then replace_slice "$trouble"; else look_at_job; fi
  pause
done
