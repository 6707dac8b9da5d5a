"""The real supervisor over the real daemon; only its pauses come from the test (NODE_TIMING, a JSON object).

A daemon that is killed fifty times in a minute is what these tests are about; a real node would make
longer and longer pauses between the starts of such a daemon. While the file NODE_HOLD is there each daemon
stops itself before it can hear a signal: nobody from outside could be sure to be that quick.
"""

import json
import os
import sys

from ckptd import supervisor
from ckptd.errors import CkptdError
from ckptd.supervisor.say import Voice
from ckptd.supervisor.unit import Timing

HELD = """\
import os, signal, sys
if os.path.exists(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGSTOP)
os.execv(sys.argv[2], sys.argv[2:])
"""


def main() -> int:
    flags = supervisor._parse(sys.argv[1:])
    voice = Voice("json")
    timing = Timing(**json.loads(os.environ.pop("NODE_TIMING")))
    hold = os.environ.pop("NODE_HOLD", "")
    first = (sys.executable, "-c", HELD, hold) if hold else ()
    try:
        return supervisor.supervise(flags, (*first, *supervisor.DAEMON, *flags.to_daemon()), voice, timing)
    except CkptdError as error:
        voice.refuse(error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
