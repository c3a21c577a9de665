#!/usr/bin/env bash
# Start a script on this machine: one rank per GPU, or 2 ranks where there is none.
#
#   ./torchrun.sh launch/train.py configs/demo.yaml parallel.tp=2
#   NPROC=4 ./torchrun.sh launch/train.py
#
# The ranks meet on a free port of the loopback interface.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: [NPROC=ranks] ./torchrun.sh SCRIPT [ARGUMENTS]" >&2
    exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)

if [[ -z ${NPROC:-} ]]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    NPROC=$((gpus > 0 ? gpus : 2))
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / NPROC))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

# A script that isn't found from the working directory is this repository's.
script=$1
shift
[[ -e $script ]] || script=$here/$script

exec "$python" -m torch.distributed.run \
    --nproc_per_node "$NPROC" \
    --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 \
    "$script" "$@"
