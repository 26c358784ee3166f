"""Define fixtures that run an action in a child process and kill it."""

import os
import sys
import traceback

import pytest


@pytest.fixture(name="in_child")
def _in_child():
    def in_child(action):
        """Runs an action in a child process and returns its exit code, negative for a signal."""
        child = os.fork()
        if child == 0:
            try:
                action()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return in_child


def die_at(moment, action):
    """Runs an action in a process that dies right before its ``moment``-th change on disk; returns whether it died."""
    changes = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.symlink"}
    process = os.fork()
    if process == 0:
        left = moment

        def hook(event, arguments):
            nonlocal left
            if event in changes:
                left -= 1
                if left < 0:
                    os._exit(9)  # as sudden as SIGKILL: no finally, no except, no flush

        try:
            sys.addaudithook(hook)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, 9), "the action failed"
    return code == 9


def _deaths(tmp_path, action, prepare):
    """Yields a run folder for each moment at which a process can die in ``action``, and one where it lived."""
    for moment in range(200):
        run = tmp_path / f"run-{moment}"
        run.mkdir()
        prepare(run)
        died = die_at(moment, lambda run=run: action(run))
        yield run
        if not died:
            assert moment > 2, "the hook saw nothing"
            return
    raise AssertionError("it never got to the end")


@pytest.fixture
def deaths():
    return _deaths
