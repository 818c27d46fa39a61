"""Where exceptions become messages and exit codes: the one place that catches what it does not know.

A user's mistake gets one line naming the value, what is allowed and the way out. A mistake of ours gets its
last line and how to see the rest: `fewbits --debug ...` or FEWBITS_DEBUG=1.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import typer

from fewbits.core.errors import FewbitsError

DEBUG = "FEWBITS_DEBUG"


class Boundary:
    """A context that ends the process with the right message and exit code when its body raises."""

    def __init__(self, *, resumes: bool = False) -> None:
        self.resumes = resumes

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (typer.Exit, typer.Abort, SystemExit, BrokenPipeError)):
            return
        if os.environ.get(DEBUG, "") not in ("", "0") and not isinstance(error, KeyboardInterrupt):
            traceback.print_exception(error, file=sys.stderr)
        message, code = self._explain(error)
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(code)

    def _explain(self, error: BaseException) -> tuple[str, int]:
        again = "; the same command resumes" if self.resumes else ""
        if isinstance(error, FewbitsError):
            return str(error), error.exit_code
        if isinstance(error, KeyboardInterrupt):
            return f"interrupted{again}", 1
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" writing '{error.filename}'" if error.filename else ""
            return f"no space left on the device{where}: make room{again or ' and run again'}", 1
        if isinstance(error, OSError) and error.filename:
            return f"'{error.filename}': {error.strerror}", 1
        if isinstance(error, MemoryError):
            return f"out of memory{again}; a smaller --samples or --sequence-length takes less", 1
        text = str(error).strip().split("\n")[0]
        name = type(error).__name__
        return f"{name}: {text} (this is a bug or an unforeseen failure; {DEBUG}=1 shows the traceback)", 1


def guarded(*, resumes: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command so that it runs inside a `Boundary`."""

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> Any:
            with Boundary(resumes=resumes):
                return command(*args, **kwargs)

        return run

    return wrap
