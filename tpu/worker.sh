#!/usr/bin/env bash
# Runs on a worker, in its copy of the code: installs it, and keeps one command running detached.
#
#   tpu/worker.sh install | start COMMAND... | state | stop | log [tail's options]
#
# `state` prints `running`, `exited CODE` or `absent`. What the command prints is in job/log.

set -euo pipefail

CODE=$(cd "$(dirname "$0")/.." && pwd)
JOB=${LLAMA_JAX_JOB:-$HOME/llama-jax-job}
STOP_S=${LLAMA_JAX_STOP_S:-120} # for a save; then it is killed

boot() { cat /proc/sys/kernel/random/boot_id; }

# A process number means nothing after a reboot, when it may be another's.
alive() { [[ -f $JOB/pid && $(cat "$JOB/boot") == "$(boot)" ]] && kill -0 "$(cat "$JOB/pid")" 2>/dev/null; }

state() {
  if [[ ! -f $JOB/pid ]]; then
    echo absent
  elif [[ -f $JOB/exit_code ]]; then
    echo "exited $(cat "$JOB/exit_code")"
  elif alive; then
    echo running
  else
    echo "exited 137" # killed, or gone with a reboot: nobody wrote a code
  fi
}

start() {
  if [[ $(state) == running ]]; then
    echo "tpu/worker.sh: a command is running already: $(cat "$JOB/command")" >&2
    return 1
  fi
  mkdir -p "$JOB"
  rm -f "$JOB/exit_code"
  printf '%q ' "$@" >"$JOB/command"
  boot >"$JOB/boot"
  printf '\n== %s %s\n' "$(date -u +%FT%TZ)" "$(cat "$JOB/command")" >>"$JOB/log"
  cd "$CODE"
  huge_pages
  # A session of its own: closing the connection doesn't reach it, and `stop` reaches all of it.
  # shellcheck disable=SC2016 # expanded by the inner shell
  PATH=$CODE/.venv/bin:$PATH PYTHONUNBUFFERED=1 setsid bash -c '
    job=$1 && shift
    "$@" && code=0 || code=$?
    echo "$code" >"$job/exit_code.new" && mv "$job/exit_code.new" "$job/exit_code"
  ' worker "$JOB" "$@" >>"$JOB/log" 2>&1 </dev/null &
  echo $! >"$JOB/pid"
  echo "started"
}

stop() {
  alive || return 0
  local group begun=$SECONDS
  group=$(cat "$JOB/pid")
  # Not to the shell that waits for it: that one notes the exit code.
  pkill -TERM -P "$group" 2>/dev/null || true
  while alive && ((SECONDS - begun < STOP_S)); do sleep 0.2; done
  if alive; then kill -KILL -- "-$group" 2>/dev/null || true; fi
}

# JAX asks for them on v5e and newer: its start is slow without.
huge_pages() {
  local file=/sys/kernel/mm/transparent_hugepage/enabled
  if [[ -f $file && $(cat "$file") != "[always]"* ]]; then
    sudo -n sh -c "echo always >$file" 2>/dev/null || true
  fi
}

# Images of TPU VMs have a Python that is too old; uv brings one.
install() {
  cd "$CODE"
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python=$(command -v python3.12 || command -v python3.11 || true)
    if [[ -z $python ]] || ! "$python" -m venv .venv; then
      rm -rf .venv
      python3 -m pip install --quiet --user 'uv>=0.9'
      python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  local pins=constraints/py312.txt
  if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then pins=constraints/py311.txt; fi
  .venv/bin/python -m pip install --quiet -c "$pins" -e '.[tpu]'
  .venv/bin/llama-jax --version
}

verb=${1:-}
shift || true
case $verb in
  install) install ;;
  start) start "$@" ;;
  state) state ;;
  stop) stop ;;
  log) exec tail "${@:---lines=50}" "$JOB/log" ;;
  *)
    echo "usage: tpu/worker.sh install | start COMMAND... | state | stop | log" >&2
    exit 2
    ;;
esac
