"""The command `mergemill`: its signals, its errors, its exit codes.

0 done · 1 failed · 2 the recipe, its inputs or the command line are wrong · 130 Ctrl-C · 143 SIGTERM
"""

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mergemill.cli import console, signals


def main() -> NoReturn:
    """Run the command line of this process."""
    gc.set_threshold(200_000)  # objects of imports and plans stay: looking for garbage among them is a tenth of a start
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's, of which nothing is asked; they spin when they start
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # else each start reads what all packages offer it
    console.open_streams()
    signals.leave_on_signals()
    console.silence_libraries()
    code = execute(sys.argv[1:])
    gc.freeze()  # else Python, as it ends, looks for garbage among all that was imported: a tenth of a short command
    sys.exit(code)


def execute(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; whatever goes wrong is one line on stderr."""
    try:
        from mergemill import engine  # noqa: F401 - first, since it refuses systems that it does not run on
        from mergemill.cli.app import make_command, warn_of_variables

        _check_text(arguments)
        command = make_command(next(iter(arguments), ""))
        if not {"-q", "--quiet"} & set(arguments):
            for warning in warn_of_variables(os.environ, command):
                console.note(f"warning: {warning}")
        code = command(list(arguments), prog_name="mergemill", standalone_mode=False, obj=list(arguments))
        console.flush()
    except signals.Interrupted as stop:
        console.show_stop(str(stop))
        return stop.exit_code
    except BrokenPipeError:
        console.drop_stdout()
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence, and it says what it caught
        console.show_error(error)
        with console.even_unheard():
            pass  # what stdout holds back may be what it does not take
        return int(getattr(error, "exit_code", 1))
    return int(code or 0)


def _check_text(arguments: Sequence[str]) -> None:
    """Raise `InputError` for what is not UTF-8: plans and records, which are text, could not name it."""
    from mergemill.engine.errors import InputError

    for argument in arguments:
        if any("\ud800" <= mark <= "\udfff" for mark in argument):
            raise InputError(f"{argument}: is not UTF-8; give it another name")
