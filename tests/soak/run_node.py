"""The real supervisor over a daemon whose wall clock can be set (run_daemon.py); pauses as in tests/support/run_node.py."""

import json
import os
import sys
from pathlib import Path

from ckptd import supervisor
from ckptd.supervisor.say import Voice
from ckptd.supervisor.unit import Timing

DAEMON = (sys.executable, "-P", str(Path(__file__).with_name("run_daemon.py")))

if __name__ == "__main__":
    flags = supervisor._parse(sys.argv[1:])
    timing = Timing(**json.loads(os.environ.pop("NODE_TIMING")))
    sys.exit(supervisor.supervise(flags, (*DAEMON, *flags.to_daemon()), Voice("json"), timing))
