"""The `ckptd` command with the stand-in daemon in the place of the real one, and short times (STAND_IN_TIMING)."""

import json
import os
import sys
from pathlib import Path

from ckptd import supervisor
from ckptd.errors import CkptdError
from ckptd.supervisor.say import Voice
from ckptd.supervisor.unit import Timing


def main() -> int:
    flags = supervisor._parse(sys.argv[1:])
    command = (sys.executable, str(Path(__file__).with_name("stand_in_daemon.py")), *flags.to_daemon())
    voice = Voice("json")
    try:
        return supervisor.supervise(
            flags, command, voice, Timing(**json.loads(os.environ.get("STAND_IN_TIMING", "{}")))
        )
    except CkptdError as error:
        voice.refuse(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
