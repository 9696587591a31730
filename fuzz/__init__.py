"""What is thrown at the service to break it: coverage-guided fuzzing, and Autobahn's cases.

`python -m fuzz.frames`, `manifests`, `service` and `session` need requirements/fuzz.txt;
`python -m fuzz.autobahn` needs a Python 2.7.
"""
