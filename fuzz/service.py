"""Requests, sequences and models that come and go, fuzzed: `python -m fuzz.service`."""

from fuzz import run

if __name__ == "__main__":
    run.main("service")
