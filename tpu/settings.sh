# shellcheck shell=bash
# Sourced by every script here: arguments, settings, and how commands are run and printed.
# Settings are SLICE_* variables of the environment or lines of a config file.

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=tpu/$(basename "$0")
DRY_RUN=false
CONFIG=
DELETE=tpu/delete.sh
ARGUMENTS=() # what stands after `--`

SETTINGS=(
  SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE SLICE_TIER SLICE_RUN_DIR SLICE_COUNT
  SLICE_RUNTIME_VERSION SLICE_SOURCE SLICE_PRICE_PER_CHIP_HOUR SLICE_WAIT_S SLICE_POLL_S
  SLICE_NETWORK SLICE_SUBNETWORK SLICE_SERVICE_ACCOUNT SLICE_IMAGE
)

say() { printf '%s\n' "$*"; }
warn() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }
fail() {
  warn "error: $*"
  exit 1
}
wrong() {
  warn "error: $*"
  exit 2
}

# The script's own head comment is its help.
usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# Options that every script takes. A script's own go through `own_option NAME VALUE`, which it
# defines before, and which returns how many words it took.
read_arguments() {
  local taken
  while (($#)); do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --dry-run) DRY_RUN=true && shift ;;
      --config)
        (($# > 1)) || wrong "--config needs a file"
        CONFIG=$2 && shift 2
        ;;
      --)
        shift
        # shellcheck disable=SC2034 # read by job.sh
        ARGUMENTS=("$@")
        break
        ;;
      *)
        taken=0
        if declare -F own_option >/dev/null; then own_option "$@" || taken=$?; fi
        ((taken)) || wrong "unknown option '$1'; see --help"
        shift "$taken"
        ;;
    esac
  done
}

read_settings() {
  local file=$CONFIG line name number=0
  if [[ -z $file && -f $HERE/slice.conf ]]; then file=$HERE/slice.conf; fi
  if [[ -n $file ]]; then
    [[ -f $file ]] || wrong "$file: no such file"
    while IFS= read -r line || [[ -n $line ]]; do
      number=$((number + 1))
      [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
      [[ $line =~ ^[[:space:]]*([A-Z_]+)=(.*)$ ]] || wrong "$file:$number: not of the form NAME=value"
      name=${BASH_REMATCH[1]}
      [[ " ${SETTINGS[*]} " == *" $name "* ]] || wrong "$file:$number: unknown setting $name"
      # The environment wins; the file is read, never run.
      [[ -n ${!name+set} ]] || printf -v "$name" '%s' "$(unquoted "${BASH_REMATCH[2]}")"
    done <"$file"
  fi
  : "${SLICE_COUNT:=1}" "${SLICE_TIER:=spot}" "${SLICE_SOURCE:=local}" "${SLICE_WAIT_S:=3600}"
  : "${SLICE_POLL_S:=30}" "${SLICE_RUN_DIR:=}" "${SLICE_PRICE_PER_CHIP_HOUR:=}" "${SLICE_NETWORK:=}"
  : "${SLICE_SUBNETWORK:=}" "${SLICE_SERVICE_ACCOUNT:=}" "${SLICE_RUNTIME_VERSION:=}"
}

unquoted() {
  local value=$1
  if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
  printf '%s' "$value"
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || wrong "$name isn't set, in ${CONFIG:-tpu/slice.conf} or the environment"
  done
  [[ $SLICE_TIER =~ ^(spot|on-demand|reserved)$ ]] ||
    wrong "SLICE_TIER is '$SLICE_TIER'; spot, on-demand or reserved"
  local count
  for count in SLICE_COUNT SLICE_WAIT_S SLICE_POLL_S; do
    [[ ${!count} =~ ^[0-9]+$ ]] || wrong "$count is '${!count}', not a whole number"
  done
  ((SLICE_COUNT > 0)) || wrong "SLICE_COUNT is 0"
  command -v gcloud >/dev/null || $DRY_RUN || fail "gcloud isn't installed: cloud.google.com/sdk"
}

# Do it, or with --dry-run say what would be done. Every command that changes anything goes here.
run() {
  printf '+%s\n' "$(printf ' %q' "$@")" >&2
  $DRY_RUN || "$@"
}

# Ask without changing anything; with --dry-run the answer is the first argument.
ask() {
  local assumed=$1
  shift
  if $DRY_RUN; then
    printf '+%s\n' "$(printf ' %q' "$@")" >&2
    printf '%s\n' "$assumed"
  else
    "$@"
  fi
}

pause() { $DRY_RUN || sleep "$SLICE_POLL_S"; }

# Chips of a slice by its accelerator type: v4 and v5p are named by cores, two a chip.
chips() {
  local family=${1%-*} size=${1##*-}
  [[ $size =~ ^[0-9]+$ && $family != "$1" ]] || wrong "'$1' is not an accelerator type like v5litepod-16"
  case $family in
    v4 | v5p | tpu7x) echo $((size / 2)) ;;
    v5litepod | v6e) echo "$size" ;;
    *) wrong "unknown TPU family '$family'; v4, v5litepod, v5p, v6e or tpu7x" ;;
  esac
}

runtime_version() {
  if [[ -n $SLICE_RUNTIME_VERSION ]]; then
    echo "$SLICE_RUNTIME_VERSION"
    return
  fi
  # https://docs.cloud.google.com/tpu/docs/runtimes
  case ${SLICE_ACCELERATOR_TYPE%-*} in
    v4) echo tpu-ubuntu2204-base ;;
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
    *) wrong "no runtime version known for $SLICE_ACCELERATOR_TYPE; set SLICE_RUNTIME_VERSION, or use GKE (tpu/xpk.sh)" ;;
  esac
}

# `16 chips, 19.20 an hour` of a count of chips, with the price if there is one.
cost() {
  if [[ -z $SLICE_PRICE_PER_CHIP_HOUR ]]; then
    echo "$1 chips (SLICE_PRICE_PER_CHIP_HOUR isn't set)"
  else
    awk -v n="$1" -v p="$SLICE_PRICE_PER_CHIP_HOUR" 'BEGIN { printf "%d chips, %.2f an hour\n", n, n * p }'
  fi
}

# Called on exit by each script that leaves a slice behind, however it ends.
tell_what_runs() {
  local with=${CONFIG:+ --config $CONFIG}
  $DRY_RUN || warn "$SLICE_NAME may be running in $SLICE_ZONE and cost money: $(cost $(($(chips "$SLICE_ACCELERATOR_TYPE") * SLICE_COUNT))). Delete it with: $DELETE$with"
}
