# shellcheck shell=bash
# Sourced after gcloud.sh: the command that runs on every worker, through tpu/worker.sh there.

# The command after `--`, with the run directory of the settings where it names none.
read_command() {
  ((${#ARGUMENTS[@]})) || wrong "no command; give one after --, such as: -- llama-jax train RUN"
  COMMAND=("${ARGUMENTS[@]}")
  if [[ "${COMMAND[*]:0:2}" == "llama-jax train" && " ${COMMAND[*]} " != *" --run-dir"* ]]; then
    [[ -n $SLICE_RUN_DIR ]] || wrong "no --run-dir in the command, and SLICE_RUN_DIR isn't set"
    COMMAND+=(--run-dir "$SLICE_RUN_DIR")
  fi
}

# Several workers write one run: a folder of one VM's disk would be another one on each.
check_run_dir() {
  local words=" ${COMMAND[*]} " workers
  [[ $words == *" --run-dir "* && $words != *" --run-dir gs://"* ]] || return 0
  workers=$(num_workers "$(nodes | head -n 1)")
  if ((SLICE_COUNT > 1 || ${workers:-1} > 1)); then
    wrong "$SLICE_NAME has several workers, so the run directory must be one that all see: gs://BUCKET/FOLDER"
  fi
}

start_job() {
  local node failed=0
  for node in $(nodes); do
    on "$node" all "bash llama-jax/tpu/worker.sh start $(quoted "${COMMAND[@]}")" || failed=1
  done
  return "$failed"
}

stop_job() {
  local node
  for node in $(nodes); do on "$node" all "bash llama-jax/tpu/worker.sh stop" || true; done
}

# A line for each worker that answers: `running`, `exited CODE` or `absent`.
job_states() {
  local node places noise=/dev/null
  mapfile -t places < <(where)
  # gcloud tells of each connection; what is wrong with one shows in the count of answers.
  if $DRY_RUN; then noise=/dev/stderr; fi
  for node in $(nodes); do
    ask 'exited 0' gcloud compute tpus tpu-vm ssh "$node" "${places[@]}" --worker=all --quiet \
      --command='bash llama-jax/tpu/worker.sh state' 2>>"$noise" || true
  done | grep -oE '(running|exited [0-9]+|absent)$' || true
}
