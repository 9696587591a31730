"""The pyinfra side: turns an inventory into gateways and workers, and checks that they answer.

Runs on the operator's machine alone. Imports pyinfra and the templates; never torch.
"""
