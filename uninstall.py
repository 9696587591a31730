"""Each host as it was found before the first deploy: `pyinfra inventory.py uninstall.py`.

What would go and what would stay, with the reason: `pyinfra --dry inventory.py uninstall.py`. Logs
stay; `--data keep=models,logs` keeps the models as well, `--data keep=nothing` neither. Only what
was made here is taken away; what somebody changed since is named, and left. Safe to repeat, safe to
interrupt.
"""

from pyinfra import host, inventory

from provision import preflight, removal
from provision.operations import barrier, report

preflight.current_fleet(inventory, with_files=False)
keep = preflight.kept(host)

removal.idle(name="No training is under way")

barrier(name="Nothing speaks against it")

removal.workers_stop(name="Workers have drained and stopped")

barrier(name="Workers are gone")

removal.host_as_found(keep)

report(name="What this run came to")
