#!/bin/bash
# On each node, under srun: one torchrun, which starts the node's processes. Used by train.sh.
#
# A request to stop (SIGTERM at pre-emption, SIGUSR2 before the time limit) reaches every process of the step.
# The trainer's processes save and leave with 0; torchrun must wait for them (it would kill them after 30 s),
# and a node that is done first must not look failed (srun would kill the others in the middle of saving).
set -euo pipefail

stopped="" child=""
# shellcheck disable=SC2329 # called by the trap
stop() {
    stopped=yes
    : >"$LCL_STOPPED"
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null || true # torchrun passes it on and waits
    fi
}
trap stop TERM USR2

# Only the first node opens the rendezvous; torchrun's own guess compares names, which containers change.
host=$((SLURM_NODEID == 0))
(
    trap - TERM
    trap '' USR2 # torchrun does not know it and would die; the trainer sets its own handler
    exec env TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$LCL_SAVE_SECONDS" "$LCL_PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$LCL_PROCS_PER_NODE" --max-restarts "$LCL_RESTARTS" \
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$SLURM_STEP_ID" --rdzv-backend c10d \
        --rdzv-endpoint "$LCL_ENDPOINT" --rdzv-conf "is_host=$host" \
        --log-dir "$LCL_LOGS/ranks/$SLURM_STEP_ID/node-$SLURM_NODEID" --redirects 3 --tee 0:3 "$@"
) &
child=$!
code=0
while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
done
[[ -n $stopped ]] && exit 0
exit "$code"
