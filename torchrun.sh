#!/usr/bin/env bash
# Start a script on this machine: one rank per GPU, or 2 ranks where there is none.
#
#   ./torchrun.sh launch/train.py configs/demo.yaml parallel.tp=2
#   NPROC=4 ./torchrun.sh launch/train.py
#
# On one node the ranks meet on loopback. On several, start it once on each, with
#   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=HOST:PORT    HOST is the node with NODE_RANK 0
# (launch/slurm/train.sbatch does), on a private network: nothing between nodes is encrypted.
# NODE_RANK is SLURM's where srun starts this.
#
# LOG_DIR=FOLDER keeps each rank's output there as well.
# SIGTERM, SIGUSR1 and Ctrl-C go to the ranks, which have GRACE seconds (600) to write a checkpoint;
# launch/supervise.py says what happens to which signal.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: [NPROC=ranks] ./torchrun.sh SCRIPT [ARGUMENTS]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)

NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
if [[ ${NNODES:-1} -gt 1 ]]; then
    for name in NODE_RANK RDZV_ENDPOINT; do
        if [[ -z ${!name:-} ]]; then
            echo "NNODES=$NNODES needs $name too; see the top of $0" >&2
            exit 2
        fi
    done
fi

if [[ -z ${NPROC:-} ]]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    NPROC=$((gpus > 0 ? gpus : 2))
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc: those that this job may use
    threads=$((cores / NPROC))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# A script that isn't found from the working directory is this repository's.
script=$1
shift
[[ -e $script ]] || script=$here/$script

grace=${GRACE:-600}
scratch=$(mktemp -d)
supervise=("$python" "$here/launch/supervise.py" --grace "$grace" --remove "$scratch")
torchrun=(
    "$python" -m torch.distributed.run --nproc_per_node "$NPROC"
    # For signals that reach torchrun itself; the variable is its --shutdown-timeout, which
    # torch 2.11 doesn't have (it gives 30 s).
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${grace%.*}

if [[ ${NNODES:-1} -gt 1 ]]; then
    torchrun+=(
        --nnodes "$NNODES" --node-rank "$NODE_RANK"
        --rdzv-backend static --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-ttt-dist}"
    )
else
    # torchrun's usual rendezvous on one node is a server on all interfaces that unpickles what it
    # is sent. A file that nobody else can open takes its place, and the ranks' own connections
    # stay on loopback.
    torchrun+=(
        --rdzv-backend c10d --rdzv-endpoint "$scratch/rendezvous" --rdzv-conf store_type=file
        --local-addr 127.0.0.1
    )
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    if [[ -e /sys/class/net/lo ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}
    fi
fi
if [[ -n ${LOG_DIR:-} ]]; then
    torchrun+=(--log-dir "$LOG_DIR${NODE_RANK:+/node-$NODE_RANK}" --tee 3)
else
    torchrun+=(--log-dir "$scratch/logs") # or it leaves an empty folder among the temporary ones
fi

exec "${supervise[@]}" "${torchrun[@]}" "$script" "$@"
