"""The bytes of a connection, fuzzed: `python -m fuzz.session`."""

from fuzz import run

if __name__ == "__main__":
    run.main("session")
