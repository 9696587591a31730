"""Facts asked together: what the operations of a run will want to know of a host is asked in a few
round trips before the first of them, not in one for each fact. Where nothing has to be changed,
that is nearly all that a run does.

Owns the answers. They are taken in place of a question that is the same to the letter, until the
run changes anything on that host, and for `LASTS_S` at most; after that, and for everything that
was not foreseen, facts are asked as they always are. So an operation never sees the host as it was
before a change of this run, and what is foreseen decides how fast a run is, not what it does.

How it is known what will be asked: the operations themselves say so. Each is run up to its first
command or to the first fact whose answer is not there yet; what all of them lack is asked in one
script, and again until nothing is lacking. That takes as many round trips as facts depend on facts.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from paramiko import SSHException
from pyinfra import host, logger
from pyinfra.api import StringCommand, operation
from pyinfra.connectors.util import CommandOutput, OutputLine
from pyinfra.context import ctx_host

if TYPE_CHECKING:
    from pyinfra.api.host import Host

    from provision.operations import Commands

# A host may be changed by others as well: what is decided is decided by what was true lately.
LASTS_S = 30.0

# Linux takes 128 KiB in one argument (MAX_ARG_STRLEN); sudo and the shell quote it once more.
LONGEST = 48 * 1024


class Question(NamedTuple):
    """A command that only asks, and how it is run (sudo and the like)."""

    text: str
    manner: str


# Begins an operation, whose commands are what it yields.
Beginning = Callable[[], Generator[Any, None, None]]


class _UnknownError(BaseException):
    """Ends the rehearsal of an operation: it asks what is not known yet. No `except Exception` on
    the way may take it for a failure.
    """


_rehearsing = False


def rehearsing() -> bool:
    """Whether operations are only run to see what they ask."""
    return _rehearsing


def _stop_if_rehearsing() -> None:
    """Before what must not happen in a rehearsal, which ends there."""
    if _rehearsing:
        raise _UnknownError


def ask(of: Host, command: StringCommand, **manner: Any) -> tuple[bool, CommandOutput]:
    """Run a command that changes nothing on a host, now."""
    found = getattr(of, "_foresight", None)
    return found.ask(command, **manner) if found else of.run_shell_command(command, **manner)


class Foresight:
    """What is known of one host; takes the place of its `get_fact` and of what runs commands."""

    def __init__(self, of: Host) -> None:
        self._get_fact, self._run = of.get_fact, of.run_shell_command
        self._put_file = of.put_file
        self._asking = 0
        self._answers: dict[Question, CommandOutput] = {}
        self._lacking: dict[Question, tuple[StringCommand, Mapping[str, Any]]] = {}
        self._in_vain: set[Question] = set()  # what failed once is asked by its operation itself
        self._since = time.monotonic()
        of.get_fact = self.get_fact  # type: ignore[method-assign]
        of.run_shell_command = self.run_shell_command  # type: ignore[method-assign]
        of.put_file = self.put_file  # type: ignore[method-assign]
        of._foresight = self  # type: ignore[attr-defined]

    def get_fact(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's own, from what is known where it is."""
        self._asking += 1
        try:
            return self._get_fact(*args, **kwargs)
        finally:
            self._asking -= 1

    def ask(self, command: StringCommand, **manner: Any) -> tuple[bool, CommandOutput]:
        """As the host's own for a command that changes nothing, and whose answer counts now."""
        _stop_if_rehearsing()
        return self._run(command, **manner)

    def run_shell_command(
        self, command: StringCommand | str, *args: Any, **kwargs: Any
    ) -> tuple[bool, CommandOutput]:
        """As the host's own. What does not ask changes something, so nothing is known after it."""
        command = StringCommand(command) if isinstance(command, str) else command
        if not self._asking:
            _stop_if_rehearsing()
            self._answers.clear()
            return self._run(command, *args, **kwargs)
        manner = {key: value for key, value in kwargs.items() if key.startswith("_")}
        question = Question(command.get_raw_value(), repr(sorted(manner.items())))
        if not _rehearsing and time.monotonic() - self._since > LASTS_S:
            self._answers.clear()
        if question in self._answers:
            return True, self._answers[question]
        if _rehearsing:
            if question not in self._in_vain:
                self._lacking[question] = command, manner
            raise _UnknownError
        return self._run(command, *args, **kwargs)

    def put_file(self, *args: Any, **kwargs: Any) -> bool:
        """As the host's own."""
        _stop_if_rehearsing()
        self._answers.clear()
        return self._put_file(*args, **kwargs)

    def look(self, operations: Iterable[Beginning]) -> None:
        """Ask all that these operations will, as far as they would go without a change.

        A host that does not answer is left to the operations, which say so and fail on it alone.
        """
        self._answers.clear()
        self._since = time.monotonic()
        waiting = list(operations)
        while waiting:
            waiting = self._rehearsed(waiting)
            if not self._lacking:
                return
            try:
                self._ask_together()
            except (
                OSError,
                SSHException,
            ):  # as pyinfra's own facts take it; a timeout is the first
                return

    def _rehearsed(self, operations: Iterable[Beginning]) -> list[Beginning]:
        """Those that lack an answer. Nothing is asked meanwhile, so no other host's turn comes."""
        global _rehearsing
        silent, logger.disabled = logger.disabled, True
        _rehearsing = True
        try:
            return [begin for begin in operations if _lacks(begin)]
        finally:
            _rehearsing = False
            logger.disabled = silent

    def _ask_together(self) -> None:
        """Everything that is lacking. Raises what running a command raises."""
        lacking, self._lacking = self._lacking, {}
        for manner, questions in _by_manner(lacking).items():
            for batch in batches(questions):
                arguments = lacking[Question(batch[0], manner)][1]
                mark = secrets.token_hex(8)
                commands = [lacking[Question(text, manner)][0] for text in batch]
                _, output = self._run(together(commands, mark), **arguments)
                found = answers(output.stdout_lines, mark)
                for number, text in enumerate(batch):
                    self._keep(Question(text, manner), found.get(number))

    def _keep(self, question: Question, lines: list[str] | None) -> None:
        if lines is None:
            self._in_vain.add(question)
        else:
            self._answers[question] = CommandOutput([OutputLine("stdout", line) for line in lines])


def _lacks(begin: Beginning) -> bool:
    """Rehearses an operation; whether it asks what is not known yet."""
    commands = begin()
    try:
        next(commands, None)
    except _UnknownError:
        return True
    except Exception:  # it says so itself when its turn comes
        return False
    finally:
        commands.close()
    return False


def _by_manner(questions: Iterable[Question]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for question in questions:
        found.setdefault(question.manner, []).append(question.text)
    return found


def batches(texts: Iterable[str], longest: int = LONGEST) -> list[list[str]]:
    """The texts in order, as few batches as fit into one argument each. Pure."""
    found: list[list[str]] = [[]]
    size = 0
    for text in texts:
        length = len(shlex.quote(text))
        if found[-1] and size + length > longest:
            found.append([])
            size = 0
        found[-1].append(text)
        size += length
    return found


def together(commands: Iterable[StringCommand], mark: str) -> StringCommand:
    """One command that runs them all, each in a shell of its own, and marks where each ends.

    + mark: what no command prints
    """
    bits: list[StringCommand | str] = []
    for number, command in enumerate(commands):
        bits += ["(", command, f"\n) </dev/null 2>/dev/null; printf '\\n{mark} {number} %s\\n' $?;"]
    return StringCommand(*bits, "true")


def answers(lines: Iterable[str], mark: str) -> dict[int, list[str]]:
    """What each command of `together` printed, by its number; without those that failed. Pure."""
    found: dict[int, list[str]] = {}
    printed: list[str] = []
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[0] == mark:
            # The mark has a line of its own, so one that the command ended is empty now.
            if printed and not printed[-1]:
                printed.pop()
            if words[2] == "0":
                found[int(words[1])] = printed
            printed = []
        else:
            printed.append(line)
    return found


_CONTEXT = ("in_op", "current_op_hash", "current_op_global_arguments", "current_op_deploy_data")


@operation()
def look() -> Commands:
    """Ask in a few round trips what the operations below will ask. Changes nothing."""
    if host.state.is_executing and not rehearsing():
        of = ctx_host.get()  # type: ignore[no-untyped-call]
        own = of.current_op_hash
        ahead = [
            of.state.ops[of][op_hash].command_generator
            for op_hash in of.op_hash_order
            if op_hash != own and op_hash in of.state.ops[of]
        ]
        # Each operation leaves the host without one.
        context = {name: getattr(of, name) for name in _CONTEXT}
        try:
            known = getattr(of, "_foresight", None) or Foresight(of)
            known.look(ahead)
        finally:
            for name, value in context.items():
                setattr(of, name, value)
    yield from ()
