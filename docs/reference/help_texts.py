"""Print the help text of every command of `matex` as one JSON object, for the page of the command line."""

import json
import os
import sys
import tempfile

# The slow imports. Each command runs in a fork that has them already.
import lightning.pytorch  # noqa: F401
import torch  # noqa: F401

COMMANDS = (
    "",
    "fit",
    "explain",
    "export",
    "prior",
    "check-data",
    "benchmark",
    "tune",
    "roar run",
    "roar status",
    "roar collect",
)


def help_text(command: str) -> str:
    """Output of `matex COMMAND --help`."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            status = 1
            try:
                from matex_pl.cli import main

                main([*command.split(), "--help"])
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stdout.flush()
                # The process ends here, whatever happened: it must not go on as a second parent.
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"`matex {command} --help` ended with the status {os.waitstatus_to_exitcode(status)}.")
        output.seek(0)
        return output.read().decode()


if __name__ == "__main__":
    # The same on every machine and terminal.
    os.environ.update(COLUMNS="84", NO_COLOR="1")
    json.dump({command: help_text(command) for command in COMMANDS}, sys.stdout)
