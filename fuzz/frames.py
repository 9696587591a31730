"""Messages of the protocol, text and binary, fuzzed: `python -m fuzz.frames`."""

from fuzz import run

if __name__ == "__main__":
    run.main("frames")
