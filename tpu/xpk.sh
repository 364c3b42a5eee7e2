#!/usr/bin/env bash
# An example for fleets larger than a few slices: GKE through xpk, which restarts failed slices.
#
#   tpu/xpk.sh image                       build and push SLICE_IMAGE from this checkout
#   tpu/xpk.sh cluster                     a GKE cluster with SLICE_COUNT slices
#   tpu/xpk.sh start -- llama-jax train RUN  the command on every host of every slice
#   tpu/xpk.sh list | stop | delete        workloads; end the workload; delete the cluster
#
# Options: --max-restarts N (of a workload, default 100), --config FILE, --dry-run. Beside the
# settings of slice.conf it takes SLICE_IMAGE, an address in Artifact Registry such as
# us-docker.pkg.dev/PROJECT/REPOSITORY/llama-jax. The cluster has SLICE_NAME's name, and costs while
# it is there, with or without a workload. Needs: pip install xpk, kubectl, docker.

# shellcheck source=tpu/settings.sh
source "$(dirname "$0")/settings.sh"
# shellcheck source=tpu/job.sh
source "$HERE/job.sh"

max_restarts=100
own_option() {
  case $1 in --max-restarts) max_restarts=${2:-} && return 2 ;; esac
}

verb=${1:-}
[[ $verb == -* ]] || shift || true
case $verb in
  image | cluster | start | list | stop | delete | --help | -h) ;;
  *) wrong "unknown verb '$verb'; image, cluster, start, list, stop or delete" ;;
esac
if [[ $verb == -* ]]; then usage && exit 0; fi
read_arguments "$@"
read_settings
need SLICE_NAME SLICE_PROJECT SLICE_ZONE SLICE_ACCELERATOR_TYPE
[[ $max_restarts =~ ^[0-9]+$ ]] || wrong "--max-restarts is '$max_restarts', not a whole number"
# shellcheck disable=SC2034 # read by tell_what_runs
DELETE=tpu/xpk.sh\ delete
$DRY_RUN || command -v xpk >/dev/null || fail "xpk isn't installed: pip install xpk"

# shellcheck disable=SC2153
place=(--cluster="$SLICE_NAME" --project="$SLICE_PROJECT" --zone="$SLICE_ZONE")
shape=(--tpu-type="$SLICE_ACCELERATOR_TYPE" --num-slices="$SLICE_COUNT")
case $verb in
  image)
    need SLICE_IMAGE
    run docker build --file "$HERE/Dockerfile" --tag "$SLICE_IMAGE" "$HERE/.."
    run docker push "$SLICE_IMAGE"
    ;;
  cluster)
    tier=(--on-demand)
    if [[ $SLICE_TIER == spot ]]; then tier=(--spot); fi
    [[ $SLICE_TIER != reserved ]] || wrong "give xpk the reservation by hand: xpk cluster create --reservation=NAME"
    trap tell_what_runs EXIT
    run xpk cluster create "${place[@]}" "${shape[@]}" "${tier[@]}" || fail "the cluster was not made"
    ;;
  start)
    need SLICE_IMAGE
    read_command
    [[ " ${COMMAND[*]} " != *" --run-dir "* || " ${COMMAND[*]} " == *" --run-dir gs://"* ]] ||
      wrong "the run directory must be one that all hosts see: gs://BUCKET/FOLDER"
    trap tell_what_runs EXIT
    run xpk workload create "${place[@]}" "${shape[@]}" --workload="$SLICE_NAME" \
      --docker-image="$SLICE_IMAGE" --max-restarts="$max_restarts" \
      --command="$(printf '%q ' "${COMMAND[@]}")" || fail "the workload was not made"
    ;;
  list) run xpk workload list "${place[@]}" ;;
  stop) run xpk workload delete "${place[@]}" --workload="$SLICE_NAME" --force ;;
  delete) run xpk cluster delete "${place[@]}" --force || fail "$SLICE_NAME may still be there and cost money" ;;
esac
