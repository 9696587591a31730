#!/usr/bin/env bash
# One host's part of a training run on several: torchrun, whose agents meet through c10d.
#
#   srun --nodes=2 ./torchrun_script.sh [--epochs 10 …]     within Slurm
#   NNODES=2 MASTER_ADDR=10.0.0.31 ./torchrun_script.sh …   without it, on each host
#
# Arguments go to `python -m gpu_service.training`. What may be set in the environment:
#   MASTER_ADDR     host of the rendezvous (Slurm: the first of the job)
#   MASTER_PORT     its port (29400)
#   NNODES          how many hosts, as torchrun's --nnodes (Slurm: those of the job); 1:2 is elastic
#   NPROC_PER_NODE  processes on this host (one a GPU, or one)
#   RDZV_ID         a name that all hosts share and no other run has (Slurm: the job's number)
#   MAX_RESTARTS    how often to start the processes again after a failure (3)
#   JOIN_TIMEOUT_S  how long to wait for the other hosts (300)
#   RDZV_CONF       more of torchrun's --rdzv_conf, for example last_call_timeout=3
#   PYTHON          interpreter that has torch (python3)
set -eu

say() { printf 'torchrun_script: %s\n' "$*" >&2; }

if [[ -z ${MASTER_ADDR:-} ]]; then
    [[ -n ${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}} ]] ||
        { say "no job of Slurm here, so MASTER_ADDR has to name the first host"; exit 2; }
    MASTER_ADDR=$(scontrol show hostname "${SLURM_JOB_NODELIST:-$SLURM_NODELIST}" | head -n 1)
    if ! getent ahosts "$MASTER_ADDR" >/dev/null; then  # Slurm knows its address, no DNS does
        MASTER_ADDR=$(scontrol --oneliner show node "$MASTER_ADDR" |
            sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    fi
fi
MASTER_PORT=${MASTER_PORT:-29400}
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}}
RDZV_ID=${RDZV_ID:-${SLURM_JOB_ID:-100}}

if [[ -z ${NPROC_PER_NODE:-} ]]; then
    gpus=(/proc/driver/nvidia/gpus/*/information)
    if [[ -e ${gpus[0]} ]]; then NPROC_PER_NODE=${#gpus[@]}; else NPROC_PER_NODE=1; fi
fi

# Which of this host's addresses the others reach: the one that leads to the first host. By itself
# torchrun takes what the hostname resolves to, which on many hosts is a loopback address: then
# nobody holds the rendezvous, and gloo listens where no other host gets.
master=$(getent ahosts "$MASTER_ADDR" | awk 'NR == 1 { print $1 }') || true
[[ -n $master ]] || { say "this host cannot resolve MASTER_ADDR=$MASTER_ADDR"; exit 2; }
route=$(ip -o route get "$master") || { say "no route to $MASTER_ADDR ($master)"; exit 2; }
address=$(sed -n 's/.* src \([^ ]*\).*/\1/p' <<<"$route")
is_host=0
if [[ $route == local\ * ]]; then
    is_host=1
    address=$master
    if [[ $NNODES != 1 && $address == 127.* ]]; then
        address=$(ip -o -4 addr show scope global | awk '{ sub("/.*", "", $4); print $4; exit }')
        [[ -n $address ]] || { say "this host has no address that others could reach"; exit 2; }
    fi
fi
interface=$(ip -o addr show to "$address" | awk '{ print $2; exit }')

export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
# Without it torch 2.13 hands restarted processes the addresses of the dead (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$(($(nproc) / NPROC_PER_NODE))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi

exec "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes="$NNODES" \
    --nproc_per_node="$NPROC_PER_NODE" \
    --rdzv_id="$RDZV_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" \
    --rdzv_conf="is_host=$is_host,join_timeout=${JOIN_TIMEOUT_S:-300}${RDZV_CONF:+,$RDZV_CONF}" \
    --local_addr="$address" \
    --max_restarts="${MAX_RESTARTS:-3}" \
    -m gpu_service.training "$@"
