"""Training on the trainers, all of them together: `pyinfra inventory.py train.py`.

Prepares the hosts, starts the run (through Slurm where the first trainer reaches one, by torchrun
otherwise), tells of its progress, and brings the bundle to models/NAME/VERSION/, ready for
deploy.py. The run outlives this command: called again, it attaches. `--data train=status` tells how
it fares, `--data train=stop` ends it.
"""

from pyinfra import host, inventory

from provision import preflight, slurm, trainers
from provision.operations import barrier, report

fleet = preflight.current_fleet(inventory, with_files=False)
as_trainer = fleet.trainers.get(host.name)
verb = preflight.train_verb(host)
planned = trainers.plan(as_trainer) if as_trainer and verb == "start" else None

if as_trainer and planned:
    if as_trainer.slurm:
        slurm.users(as_trainer)
    trainers.trainer(as_trainer, fleet, planned)
    if as_trainer.slurm:
        slurm.member(as_trainer, fleet)

barrier(name="Trainers are ready")

if as_trainer and planned and as_trainer.slurm:
    slurm.verify(as_trainer, fleet)

barrier(name="The cluster answers")

if as_trainer and planned:
    trainers.run(as_trainer, fleet, planned, through_slurm=slurm.is_used(fleet))
elif as_trainer and verb == "stop":
    trainers.stop(fleet, through_slurm=slurm.is_used(fleet))
elif as_trainer:
    trainers.status(fleet, through_slurm=slurm.is_used(fleet))

report(name="What this run came to")
