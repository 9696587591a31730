"""Training with DistributedDataParallel: one process per device, all started by torchrun.

    torchrun --standalone --nproc-per-node=2 -m gpu_service.training --output models

`__main__` is the whole run in order; `distributed` knows where this process stands among its
peers, `loop` trains and evaluates, `digits` is the data. Each rank owns its copy of the model;
rank 0 alone prints progress and writes the bundle. Without torchrun it is a run of one process.

Where torchrun is to restart lost workers (`--max-restarts`), start it with
`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` in its environment: otherwise torch 2.13 hands the new
workers the addresses of the dead (https://github.com/pytorch/pytorch/issues/135712).
"""


class TrainingError(Exception):
    """What keeps a run from starting or going on, for the person who must mend it."""
