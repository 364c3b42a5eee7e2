# shellcheck shell=bash
# Sourced after settings.sh: what is asked of Google Cloud about one queued resource and its nodes.

# shellcheck disable=SC2153 # set by read_settings
where() { printf -- '--project=%s\n--zone=%s\n' "$SLICE_PROJECT" "$SLICE_ZONE"; }

# One node a slice: NAME, or NAME-0, NAME-1, ...
nodes() {
  local number
  if ((SLICE_COUNT == 1)); then
    echo "$SLICE_NAME"
  else
    for ((number = 0; number < SLICE_COUNT; number++)); do echo "$SLICE_NAME-$number"; done
  fi
}

# gcloud's answer, or ABSENT where there is no such thing, or UNKNOWN where gcloud itself failed.
answer_of() {
  local assumed=$1 errors text
  shift
  errors=$(mktemp)
  if text=$(ask "$assumed" "$@" 2> >(tee "$errors" >&2)); then
    echo "${text:-UNKNOWN}"
  elif grep -qiE 'NOT_FOUND|not found|does not exist' "$errors"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, FAILED, SUSPENDED, ...
request_state() {
  local places
  mapfile -t places < <(where)
  answer_of "${1:-ACTIVE}" gcloud compute tpus queued-resources describe "$SLICE_NAME" \
    "${places[@]}" --format='value(state.state)'
}

# READY, CREATING, PREEMPTED, TERMINATED, ...
node_state() {
  local places
  mapfile -t places < <(where)
  answer_of READY gcloud compute tpus tpu-vm describe "$1" "${places[@]}" --format='value(state)'
}

num_workers() {
  local places
  mapfile -t places < <(where)
  ask 1 gcloud compute tpus tpu-vm describe "$1" "${places[@]}" \
    --format='value(networkEndpoints.len())'
}

# on NODE WORKER COMMAND: over ssh; WORKER is a number or `all`. The command is for a shell there.
on() {
  local places
  mapfile -t places < <(where)
  run gcloud compute tpus tpu-vm ssh "$1" "${places[@]}" --worker="$2" --quiet --command="$3"
}

send() {
  local places
  mapfile -t places < <(where)
  run gcloud compute tpus tpu-vm scp "$2" "$1:$3" "${places[@]}" --worker=all --quiet
}

# A shell word for each argument, for a command that another shell reads.
quoted() { printf '%q ' "$@"; }

# Wait until the request is granted; non-zero when it was refused or $1 seconds have passed.
wait_until_active() {
  local limit_s=$1 begun=$SECONDS state last=
  while true; do
    state=$(request_state)
    if [[ $state != "$last" ]]; then say "$SLICE_NAME: $state"; fi
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT) return 1 ;;
    esac
    if ((limit_s > 0 && SECONDS - begun >= limit_s)); then return 2; fi
    pause
  done
}

request_slice() {
  local places request=()
  mapfile -t places < <(where)
  request+=(--accelerator-type="$SLICE_ACCELERATOR_TYPE" --runtime-version="$(runtime_version)")
  if ((SLICE_COUNT == 1)); then
    request+=(--node-id="$SLICE_NAME")
  else
    request+=(--node-count="$SLICE_COUNT" --node-prefix="$SLICE_NAME")
  fi
  case $SLICE_TIER in
    spot) request+=(--spot) ;;
    reserved) request+=(--reserved) ;;
    on-demand) ;;
  esac
  if [[ -n $SLICE_NETWORK ]]; then request+=(--network="$SLICE_NETWORK"); fi
  if [[ -n $SLICE_SUBNETWORK ]]; then request+=(--subnetwork="$SLICE_SUBNETWORK"); fi
  if [[ -n $SLICE_SERVICE_ACCOUNT ]]; then request+=(--service-account="$SLICE_SERVICE_ACCOUNT"); fi
  run gcloud compute tpus queued-resources create "$SLICE_NAME" "${places[@]}" "${request[@]}" --quiet
}

# Delete the request with its nodes. Zero also when there was none.
delete_slice() {
  local places state
  mapfile -t places < <(where)
  state=$(request_state)
  if [[ $state == ABSENT ]]; then
    say "$SLICE_NAME: nothing to delete"
    return 0
  fi
  run gcloud compute tpus queued-resources delete "$SLICE_NAME" "${places[@]}" --force --quiet ||
    return 1
  state=$(request_state ABSENT)
  [[ $state == ABSENT ]]
}
