"""What is asked ahead, on this machine by pyinfra's `@local`: how often a host is asked, and that
an operation never sees it as it was before a change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyinfra import host
from pyinfra.api import Config, Inventory, State, StringCommand, operation
from pyinfra.api.connect import connect_all
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operation import add_op
from pyinfra.api.operations import run_ops
from pyinfra.api.state import StateStage
from pyinfra.facts.server import Kernel
from typing_extensions import override

from provision import foresight
from provision.facts import Lines, quoted, script
from provision.operations import Commands, ask, executing


class Text(Lines):
    """The lines of a file; fails where there is none."""

    @override
    def command(self, path: str) -> StringCommand:
        return quoted("cat", path)


class Run:
    """One run of pyinfra on this machine, and every command that it ran."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.state = State(Inventory((["@local"], {})), Config())
        self.state.set_stage(StateStage.Connect)
        connect_all(self.state)
        self.state.check_for_changes = False  # as with -y
        self.state.set_stage(StateStage.Prepare)
        (self.host,) = self.state.inventory
        self._run = self.host.connector.run_shell_command
        self.host.connector.run_shell_command = self._noted  # type: ignore[method-assign]

    def _noted(self, command: StringCommand, *args: Any, **kwargs: Any) -> Any:
        self.commands.append(command.get_raw_value())
        return self._run(command, *args, **kwargs)

    def __call__(self, *operations: Callable[..., Any]) -> list[str]:
        add_op(self.state, foresight.look)
        for number, each in enumerate(operations):
            add_op(self.state, each, name=f"{number}")
        self.state.set_stage(StateStage.Execute)
        run_ops(self.state)
        return self.commands


@pytest.fixture
def seen() -> list[Any]:
    return []


def reading(seen: list[Any], *paths: Path) -> Callable[..., Any]:
    """An operation that reads files, and notes what it saw."""

    @operation()
    def read() -> Commands:
        found = [host.get_fact(Text, path=str(path)) for path in paths]
        if executing():
            seen.extend(found)
        yield from ()

    return read


def changing(path: Path, text: str) -> Callable[..., Any]:
    @operation()
    def change() -> Commands:
        if host.get_fact(Text, path=str(path)) != (text,):
            yield script('printf "%s\\n" "$1" > "$2"', text, str(path))

    return change


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number in range(3):
        (tmp_path / f"{number}").write_text(f"{number}\n")
    return sorted(tmp_path.iterdir())


def test_operations_that_change_nothing_cost_one_question(
    files: list[Path], seen: list[Any]
) -> None:
    commands = Run()(*(reading(seen, path) for path in files))
    assert seen == [("0",), ("1",), ("2",)]
    # An operation is rehearsed up to the first fact that is not known, so one each.
    assert len(commands) == 1


def test_facts_of_one_operation_cost_as_many_questions_as_they_follow_each_other(
    files: list[Path], seen: list[Any]
) -> None:
    assert len(Run()(reading(seen, *files), reading(seen, *files))) == 3
    assert seen == [("0",), ("1",), ("2",)] * 2


def test_what_a_change_made_is_seen_by_the_operations_after_it(
    files: list[Path], seen: list[Any]
) -> None:
    Run()(reading(seen, files[0]), changing(files[0], "new"), reading(seen, files[0]))
    assert seen == [("0",), ("new",)]


def test_an_upload_is_a_change(files: list[Path], seen: list[Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("uploaded\n")

    @operation()
    def upload() -> Commands:
        from pyinfra.api import FileUploadCommand

        yield FileUploadCommand(str(source), str(files[0]))

    Run()(upload, reading(seen, files[0]))
    assert seen == [("uploaded",)]


def test_answers_end_with_time(
    files: list[Path], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "LASTS_S", -1.0)
    Run()(reading(seen, files[0]))
    assert seen == [("0",)]


def test_a_question_is_asked_now_and_changes_nothing(files: list[Path], seen: list[Any]) -> None:
    @operation()
    def looks() -> Commands:
        if executing():
            _, output = ask(quoted("cat", str(files[1])))
            seen.append(output.stdout)
        yield from ()

    commands = Run()(reading(seen, files[0]), looks, reading(seen, files[0]))
    assert seen == [("0",), "1", ("0",)]
    assert len(commands) == 2


def test_what_a_host_is_like_after_a_failed_fact_is_left_to_the_operation(
    files: list[Path], seen: list[Any], tmp_path: Path
) -> None:
    run = Run()
    with pytest.raises(PyinfraError, match="No hosts remaining"):
        run(reading(seen, files[0]), reading(seen, tmp_path / "missing"))
    assert seen == [("0",)]
    assert len(run.commands) == 2  # all together; then the one that failed, by its operation


def test_a_host_that_does_not_answer_fails_by_its_operation_and_ends_no_run_of_others(
    files: list[Path], seen: list[Any]
) -> None:
    run = Run()

    def lost(*_: Any, **__: Any) -> Any:
        raise OSError("Socket is closed")

    run.host.connector.run_shell_command = lost  # type: ignore[method-assign]
    with pytest.raises(PyinfraError, match="No hosts remaining"):
        run(reading(seen, files[0]))


def test_an_operation_that_is_wrong_says_so_itself_once(files: list[Path], seen: list[Any]) -> None:
    @operation()
    def wrong() -> Commands:
        seen.append(executing())
        raise ValueError("no")
        yield

    with pytest.raises(ValueError, match="no"):
        Run()(reading(seen, files[0]), wrong)
    assert seen == [False, ("0",), True]


def test_operations_are_rehearsed_as_the_user_they_run_as(
    files: list[Path], seen: list[Any]
) -> None:
    """Else an answer for one user would be taken for another's."""

    class Whoami(Lines):
        @override
        def command(self) -> StringCommand:
            return script('echo "$WHO"')

    @operation()
    def who() -> Commands:
        if executing():
            seen.append(host.get_fact(Whoami))
        else:
            host.get_fact(Whoami)
        yield from ()

    run = Run()
    add_op(run.state, foresight.look)
    for number, name in enumerate(("a", "b")):
        add_op(run.state, who, name=f"{number}", _env={"WHO": name})
    run.state.set_stage(StateStage.Execute)
    run_ops(run.state)
    assert seen == [("a",), ("b",)]
    assert len(run.commands) == 2


def test_facts_of_pyinfra_itself_are_foreseen_too(seen: list[Any]) -> None:
    """Some of them are plain text."""

    @operation()
    def kernel() -> Commands:
        found = host.get_fact(Kernel)
        if executing():
            seen.append(found)
        yield from ()

    assert len(Run()(kernel, kernel)) == 1
    assert seen == ["Linux", "Linux"]


def _printed(text: str) -> list[str]:
    """As pyinfra reads what a command prints."""
    lines = text.split("\n")
    return lines[:-1] if text.endswith("\n") or not text else lines


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["C", "Z"]) | st.just("\n")), st.booleans()
        )
    )
)
def test_each_answer_is_what_its_command_printed(printed: list[tuple[str, bool]]) -> None:
    mark = "MARK"
    text = "".join(
        f"{said}\n{mark} {number} {0 if succeeded else 1}\n"
        for number, (said, succeeded) in enumerate(printed)
    )
    expected = {
        number: _printed(said) for number, (said, succeeded) in enumerate(printed) if succeeded
    }
    assert foresight.answers(_printed(text), mark) == expected


@given(st.lists(st.text(max_size=40)), st.integers(1, 100))
def test_a_batch_fits_into_an_argument(texts: list[str], longest: int) -> None:
    found = foresight.batches(texts, longest)
    assert [text for batch in found for text in batch] == texts
    assert all(len(batch) <= 1 or sum(len(text) for text in batch) <= longest for batch in found)


def test_secrets_of_a_question_are_not_shown() -> None:
    from pyinfra.api import HiddenValue, QuoteString

    asked = StringCommand("echo", QuoteString(HiddenValue("hunter2")))
    command = foresight.together([asked], "MARK")
    assert "hunter2" in command.get_raw_value()
    assert "hunter2" not in str(command)
