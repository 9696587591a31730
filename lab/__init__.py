"""Disposable Linux hosts on one machine, to try the deploy on and to test it.

`lab.inventory()` is for inventory files: cheap to import and to call, whether or not a lab is up.
"""

from lab.errors import LabError, LabNotUp
from lab.state import InventoryHost, inventory

__all__ = ["InventoryHost", "LabError", "LabNotUp", "inventory"]
