"""The process that runs a dry run: a Request in, a Result out.

    python -m megatron_dynmoe.dry_run RESULT_FILE < request.json

It ends with 0 and a file, or like every command with one line about what was wrong.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from megatron_dynmoe.dry_run.devices import shim
from megatron_dynmoe.dry_run.request import Request
from megatron_dynmoe.settings.messages.command_line import UsageError, ending_plainly


def main() -> None:
    """Run one dry run."""
    request, file = Request.from_json(sys.stdin.read()), Path(sys.argv[1])
    with ending_plainly("dynmoe plan", "nothing was counted"):
        shim.load()
        from megatron_dynmoe.dry_run.recording.places import Places
        from megatron_dynmoe.dry_run.rehearse import rehearse
        from megatron_dynmoe.dry_run.reporting.summary import summarize

        try:
            recorder, micro_batches = rehearse(request)
        except ValueError as error:  # each is about a flag or a setting
            raise UsageError(str(error)) from None
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            at, kind = Places().of_error(error), type(error).__name__
            raise ChildProcessError(f"the training fails at {at} with {kind}: {error}") from None
        file.write_text(summarize(recorder, micro_batches).to_json())


if __name__ == "__main__":
    main()
