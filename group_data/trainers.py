"""Settings of the trainers. Defaults and the rest: docs/settings.md."""

# Make them a Slurm cluster, the first its controller. Where they have Slurm already, training goes
# through it in any case.
slurm = False
