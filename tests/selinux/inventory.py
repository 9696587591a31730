"""The test VM as a gateway. What stands for its workers runs in it, too, and is not deployed:
`--limit gateways`.
"""

import json
import os
import sys

import lab
from lab import vm
from provision.preflight import check_inventory

try:
    _vm = vm.inventory(os.environ["GATEWAY_LAB"])
except lab.LabError as error:
    sys.exit(str(error))

_data = {key: value for key, value in _vm.items() if key != "name"}
_settings = json.loads(os.environ.get("GATEWAY_TEST_SETTINGS", "{}"))
gateways = [(vm.HOST, {**_data, **_settings})]
workers = [("workers", _data)]

check_inventory(__file__)
