#!/usr/bin/env bash
# Put the code on every worker and install it from the pinned constraints, with the tpu extra.
#
#   tpu/setup.sh [--config FILE] [--dry-run]
#
# SLICE_SOURCE=local sends this checkout as it lies (what git ignores is left out); a git URL, with
# #REF for a branch, tag or commit, is cloned by the workers.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/gcloud.sh
source "$HERE/gcloud.sh"

read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE
trap 'rm -f "${archive:-}"; tell_what_runs' EXIT

# A download without git's folder is sent but for what is made in it.
list_files() {
  if git -C "$HERE/.." rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$HERE/.." ls-files -z --cached --others --exclude-standard
  else
    (cd "$HERE/.." && find . -type f ! -path './.venv*' ! -path './.cache/*' ! -path './runs/*' -print0)
  fi
}

# The folder is emptied of an earlier copy, but its environment stays and is only brought up to date.
unpack='mkdir -p llama-jax && cd llama-jax && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +'
if [[ $SLICE_SOURCE == local ]]; then
  archive=$(mktemp --suffix=.tar.gz)
  list_files |
    tar --create --gzip --file="$archive" --directory="$HERE/.." --null --files-from=- --ignore-failed-read
  unpack+=' && tar xzf ~/llama-jax.tar.gz && bash tpu/worker.sh install'
else
  url=${SLICE_SOURCE%%#*} ref=
  if [[ $SLICE_SOURCE == *'#'* ]]; then ref=${SLICE_SOURCE#*#}; fi
  unpack+=" && git init -q && git fetch -q --depth 1 $(quoted "$url" "${ref:-HEAD}")&& git checkout -q FETCH_HEAD && bash tpu/worker.sh install"
fi

set_up() {
  if [[ -n ${archive:-} ]]; then send "$1" "$archive" llama-jax.tar.gz || return 1; fi
  on "$1" all "$unpack"
}

# Slices at once, or each would wait for the ones before it.
pids=()
mapfile -t names < <(nodes)
for node in "${names[@]}"; do
  set_up "$node" &
  pids+=($!)
done
failed=()
for number in "${!pids[@]}"; do
  wait "${pids[$number]}" || failed+=("${names[$number]}")
done
((${#failed[@]} == 0)) || fail "setting up ${failed[*]} failed; what the workers said is above. Run it again, or see a worker with tpu/logs.sh"
say "$SLICE_NAME is set up; next: tpu/launch.sh -- llama-jax train RUN --run-dir ${SLICE_RUN_DIR:-DIR}"
