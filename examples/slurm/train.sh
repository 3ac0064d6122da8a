#!/bin/bash
# One attempt of a training job under SLURM: preflight, training, and whether to queue again.
# Started by N-node(s).sbatch, which hold only what depends on the size; see docs/cluster.md.
#
#   sbatch examples/slurm/8-nodes.sbatch --recipe paper-l14 --data /data/mmc4 --tokenizer /data/mmc4 --out /scratch/l14
#
# Arguments go to tools/pretrain_lcl.py (which adds --resume to them); --out is needed here.
# Set in the environment, or in the file named by LCL_SITE:
#   LCL_IMAGE            a container (Pyxis): docker reference or .sqsh file; none = bare metal with modules
#   LCL_MOUNTS           further Pyxis mounts, comma-separated (the repository and the run folder are mounted)
#   LCL_MODULES          modules to load without a container, e.g. "cuda/13.0"
#   LCL_PYTHON           the interpreter [container: python; bare: .venv/bin/python of the repository]
#   LCL_PROCS_PER_NODE   processes per node [the node's GPUs, else 1]
#   LCL_RESTARTS         restarts in place after a crash before the job is queued again [3]
#   LCL_MAX_REQUEUES     times that the job may be queued again by itself [100]
#   LCL_SAVE_SECONDS     longest that saving may take after a request to stop [600]
#   LCL_PREFLIGHT        more arguments of tools/doctor.py, such as "--min-bandwidth 40"; "skip" leaves it out
set -euo pipefail

ROOT=${LCL_ROOT:-${SLURM_SUBMIT_DIR:?run this through sbatch}}
if [[ -n ${LCL_SITE:-} ]]; then
    # shellcheck source=/dev/null
    source "$LCL_SITE"
fi

say() { printf '%s  %s\n' "$(date --utc +%FT%TZ)" "$*"; }
refuse() { printf 'error: %s\n' "$*" >&2; exit 2; }

RUN=
words=("$@")
for index in "${!words[@]}"; do
    case ${words[index]} in
        --out) RUN=${words[index + 1]:-} ;;
        --out=*) RUN=${words[index]#--out=} ;;
    esac
done
[[ -n $RUN ]] || refuse "no --out: the run's folder must be given. Add --out FOLDER on storage that every node sees."
[[ $RUN = /* ]] || RUN=$ROOT/$RUN
[[ -f $ROOT/tools/pretrain_lcl.py ]] || refuse "$ROOT: not this repository. Submit from its folder, or set LCL_ROOT."

# Logs of every attempt stay apart: logs/JOB-RESTART/{preflight.log,train-NODE.log,ranks/...}.
ATTEMPT=${SLURM_JOB_ID}-${SLURM_RESTART_COUNT:-0}
LOGS=$RUN/logs/$ATTEMPT
STOPPED=$LOGS/stopped-by-request
mkdir -p "$LOGS"
rm -f "$STOPPED"

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# The address SLURM itself uses: a name may not resolve inside a container or on the network of the job.
address=$(scontrol show node --oneliner "$first" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
export LCL_ROOT=$ROOT LCL_LOGS=$LOGS LCL_STOPPED=$STOPPED
export LCL_ENDPOINT=${address:-$first}:$((20000 + SLURM_JOB_ID % 20000))
export LCL_PROCS_PER_NODE=${LCL_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export LCL_RESTARTS=${LCL_RESTARTS:-3} LCL_SAVE_SECONDS=${LCL_SAVE_SECONDS:-600}
export PYTHONUNBUFFERED=1
# NCCL's flight recorder: a collective that hangs leaves who was where, beside the logs.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/nccl-trace-rank-}

# Since SLURM 22.05 srun does not take --cpus-per-task over from sbatch.
step=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}")
if [[ -n ${LCL_IMAGE:-} ]]; then
    export LCL_PYTHON=${LCL_PYTHON:-python}
    mkdir -p "$RUN"
    step+=("--container-image=$LCL_IMAGE" --no-container-mount-home "--container-workdir=$ROOT"
        "--container-mounts=$ROOT:$ROOT,$ROOT:/opt/lcl_mcore,$RUN:$RUN${LCL_MOUNTS:+,$LCL_MOUNTS}")
else
    export LCL_PYTHON=${LCL_PYTHON:-$ROOT/.venv/bin/python}
    if [[ -n ${LCL_MODULES:-} ]]; then
        module purge
        # shellcheck disable=SC2086 # one word per module
        module load $LCL_MODULES
    fi
fi
step+=("--chdir=$ROOT")

# SIGTERM reaches this script only when SLURM itself ends the job, and SLURM then decides what follows.
ending=
trap 'ending=yes' TERM

run_step() { # NAME COMMAND...: run on every node and wait through signals; its exit code
    local name=$1 code=0
    shift
    "${step[@]}" --job-name="$name" --output="$LOGS/$name-%n.log" "$@" &
    local child=$!
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || return "$code"
    done
}

steps_wanted() { sed -n '/^train:/,/^[^ ]/s/^  steps: *//p' "$RUN/config.yaml" 2>/dev/null || true; }
steps_saved() { # of the newest complete checkpoint
    local manifest name newest=0
    for manifest in "$RUN"/checkpoints/step-*[0-9]/manifest.json; do
        [[ -f $manifest ]] || continue
        name=${manifest%/manifest.json}
        name=$((10#${name##*step-}))
        ((name > newest)) && newest=$name
    done
    echo "$newest"
}

before=$(steps_saved)
say "attempt $ATTEMPT: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $LCL_PROCS_PER_NODE processes each," \
    "rendezvous $LCL_ENDPOINT, checkpoint of step $before, logs $LOGS"

code=0
if [[ ${LCL_PREFLIGHT:-} != skip ]]; then
    read -r -a checks <<<"${LCL_PREFLIGHT:-}"
    LCL_RESTARTS=0 run_step preflight examples/slurm/launch.sh tools/doctor.py --folder "$RUN" "${checks[@]}" || code=$?
    say "preflight: exit code $code, $LOGS/preflight-0.log"
fi
if [[ $code -eq 0 && ! -e $STOPPED && -z $ending ]]; then
    run_step train examples/slurm/launch.sh tools/pretrain_lcl.py "$@" --resume || code=$?
fi
after=$(steps_saved) wanted=$(steps_wanted)
say "training: exit code $code, checkpoint of step $after of ${wanted:-?}"

if [[ -n $wanted && $after -ge $wanted && $code -eq 0 ]]; then
    say "complete"
    exit 0
fi
state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([^ ]*\) .*/\1/p')
if [[ -n $ending || $state != RUNNING ]]; then
    say "SLURM ended the job ($state); it decides whether the job is queued again"
    exit "$code"
fi
# Only with code 0: when one node fails, srun stops the others as a request would.
killed=$RUN/logs/$SLURM_JOB_ID-killed
if ((after > before)); then
    rm -f "$killed"
fi
if [[ -e $STOPPED && $code -eq 0 ]]; then
    why="stopped by request"
elif ((after > before)); then
    why="failed with $code after new checkpoints"
elif ((code > 128)) && [[ ! -e $killed ]]; then
    : >"$killed"
    why="killed from outside (code $code), tried once more"
else
    say "failed with $code without a new checkpoint: not queued again; see $LOGS"
    exit "$((code ? code : 1))"
fi
if ((${SLURM_RESTART_COUNT:-0} >= ${LCL_MAX_REQUEUES:-100})); then
    say "$why; already queued again ${SLURM_RESTART_COUNT} times, LCL_MAX_REQUEUES=${LCL_MAX_REQUEUES:-100}"
    exit "$((code ? code : 1))"
fi
say "$why: queued again"
trap 'exit 0' TERM
scontrol requeue "$SLURM_JOB_ID"
# SLURM ends this script now; a script that returned first would count as the job's end.
sleep 60 &
wait $!
