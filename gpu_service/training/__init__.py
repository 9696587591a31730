"""Training with DistributedDataParallel: one process per device, all started by torchrun.

    torchrun --standalone --nproc-per-node=2 -m gpu_service.training --output models

In the order of reading: `__main__` is the whole run, `loop` its epochs, `learner` one step.
`task` says what is trained, `settings` how, `distributed` where this process stands among its
peers, `data` which samples are whose, `snapshot` what survives a crash, `evaluation` what comes
out. Each rank owns its copy of the model; rank 0 alone prints progress and writes files.

Without torchrun it is a run of one process. Where torchrun is to restart lost workers
(`--max-restarts`), start it with `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` in its environment:
otherwise torch 2.13 hands the new workers the addresses of the dead
(https://github.com/pytorch/pytorch/issues/135712).
"""


class TrainingError(Exception):
    """What keeps a run from starting or going on, for the person who must mend it."""
